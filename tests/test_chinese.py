"""What a person reads in Chinese: help, errors, the summary of a run, its report, a chat. What programs read stays."""

import json
import re
import sys

import pytest
import torch
from helpers.reported_runs import Seen, described_run

import softprompt
from softprompt import doctor
from softprompt.cli import doctor as run_doctor
from softprompt.cli import infer, main, run_command, train
from softprompt.config.loader import train_config
from softprompt.evaluation.evaluator import Evaluation, Rival
from softprompt.generation.chat.loop import hold_chat
from softprompt.generation.chat.session import ChatSession
from softprompt.report.page import page
from softprompt.training.final_metrics import verdict_of_run
from softprompt.training.summary import summary
from softprompt.utils.text_table import display_width
from softprompt.utils.translation import LOCALE_VARIABLES, VARIABLE, language, translate, translate_error

ENGLISH = re.compile(r"(?<![\w-])(?!pip install)[a-z]{2,} [a-z]{2,} [a-z]{2,}")  # three words of a sentence


@pytest.fixture
def chinese(monkeypatch):
    monkeypatch.setenv(VARIABLE, "zh")


def ended(command, argv, capsys):
    """The exit code of a command, what it printed, and its error."""
    with pytest.raises(SystemExit) as end:
        run_command(command, argv)
    return end.value.code, *capsys.readouterr()


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C.UTF-8"}, "en"),
        ({"LANG": "C", "LC_MESSAGES": "zh_CN"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", VARIABLE: "en"}, "en"),
        ({"LANG": "de_DE.UTF-8", VARIABLE: "zh-Hans"}, "zh"),
        ({"LANG": "de_DE.UTF-8"}, "en"),
    ],
    ids=str,
)
def test_the_environment_chooses_the_language(environment, expected, monkeypatch):
    for name in (*LOCALE_VARIABLES, VARIABLE):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert language() == expected


def test_the_verdict_on_a_distilled_prompt(chinese):
    """Its advice is translated part by part, and not taken for a number of virtual tokens."""
    same = Evaluation([1.0] * 20, [2] * 20, disagreements=[1] * 20)
    cut = Rival("the first 4 tokens of the text", "text cut", "_cut", same)
    told = verdict_of_run(train_config("distill-mini"), same, same, [cut])
    assert "give more questions" in told.sentence and not ENGLISH.search(translate(told.sentence))


def test_lang_overrides_the_environment(chinese, capsys):
    assert "usage: " in ended(train, ["--help", "--lang", "en"], capsys)[1]
    assert "用法：" in ended(train, ["--help"], capsys)[1]


@pytest.mark.parametrize(
    "argv", [["--lang", "xx"], ["--lang=xx", "--help"], ["--lang"], ["--lang", "--max_steps", "3"]]
)
def test_an_unknown_language_is_one_line(argv, capsys):
    code, printed, error = ended(train, argv, capsys)
    assert (code, printed, error.count("\n")) == (2, "", 1) and "--lang" in error and "zh" in error


def test_an_unknown_language_of_the_environment_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv(VARIABLE, "xx")
    code, _, error = ended(train, ["--help"], capsys)
    assert code == 2 and error.count("\n") == 1 and VARIABLE in error


def test_help_explains_everyday_flags_in_chinese_lines_that_fit(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    for command in (train, infer):
        _, text, _ = ended(command, ["--lang", "zh", "--help"], capsys)
        everyday, more = text.split("更多：", 1)
        assert "--model_name_or_path BASE" in everyday and "默认值" in everyday and not ENGLISH.search(everyday)
        assert "示例：" in more and max(map(display_width, everyday.splitlines())) <= 80
        assert not any(line.lstrip().startswith(tuple("，。；：、）")) for line in text.splitlines())


def test_the_overview_is_chinese_wherever_the_flag_stands(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["softprompt", "--lang", "zh"])
    with pytest.raises(SystemExit):
        main()
    assert "在终端中对话" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command, argv, told",
    [
        (train, ["--lr", "1"], "未知的参数 --lr；是不是指 --learning_rate？"),
        (train, ["--max_steps", "many"], "--max_steps：'many' 不是有效的 int 值"),
        (train, ["--dataset", "nope.jsonl"], "nope.jsonl：没有这个文件"),
        (train, ["--dataset", "reviews.csv"], "reviews.csv，第 2 行：列 'instruction' 必须是文本，但没有这一列"),
        (train, ["--model_name_or_path", "./nope", "--dataset", "reviews.csv"], "基座模型 './nope'：没有这个文件夹"),
        (infer, ["--prompt", "好"], "runs/ 下没有训练好的适配器；请先运行"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_frequent_errors_are_chinese_as_a_whole(command, argv, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reviews.csv").write_text("review,label\n好,正面\n", encoding="utf-8")
    code, _, error = ended(command, [*argv, "--lang", "zh"], capsys)
    assert code == 2 and error.count("\n") == 1 and error.startswith("错误：") and told in error
    assert not ENGLISH.search(error)


def test_a_message_without_translation_stays_english_as_a_whole(chinese):
    for message in ("the moon is full", "unknown flag --x; the moon is full", "cannot be read: the moon is full"):
        assert translate(message) == message and translate_error(message) == f"error: {message}"


def test_texts_of_users_are_not_translated(chinese):
    # rows and Training are texts of the catalogue, too
    assert translate("--prompts_file rows: no such file; name an existing file").startswith("--prompts_file rows：没有")
    assert translate("Try: Training") == "试一试：Training"


def test_a_run_is_told_in_chinese_and_its_files_are_not(chinese, run_settings, capsys):
    run = softprompt.train(**{**run_settings, "max_steps": 4})
    told = summary(run)
    head, rule = told.strip("\n").splitlines()[:2]
    assert "加软提示" in head and "验证集损失" in told and "试一试：" in told and not ENGLISH.search(told)
    assert len({display_width(line[: line.rstrip().rfind("  ")]) for line in (head, rule)}) == 1  # columns are aligned
    assert "数据集 rows.jsonl：" in capsys.readouterr().out
    assert '<html lang="zh-CN">' in (run.output_dir / "report.html").read_text(encoding="utf-8")
    for name in ("all_results.json", "metrics.jsonl", "report.json"):
        texts = [text for text in _texts((run.output_dir / name).read_text(encoding="utf-8").splitlines(), name)]
        assert not [text for text in texts if "验证集" in text or "训练" in text]


def _texts(lines, name):
    return lines if name.endswith(".jsonl") else [json.dumps(json.loads("\n".join(lines)), ensure_ascii=False)]


def test_adapters_are_compared_in_chinese(chinese, place, capsys):
    rows = [{"instruction": f"第{n}题", "output": "好坏无"[n % 3 and 1]} for n in range(24)]
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"instruction": "问", "output": "无"}])))
    argv = ["--adapter", "a", "--adapter", "none", "--eval_dataset", "rows.jsonl", "--choices", "好,坏"]
    infer([*argv, "--max_length", "60"])
    told, noted = capsys.readouterr()
    for text in ("损失的 95% 区间", "准确率（概率最大的标签）", "条样本", "准确率为", "标准答案", "不在可选标签中"):
        assert text in told
    assert "基座模型" in noted and re.search("a：.*(优于|比).*基座模型", told) and not ENGLISH.search(told + noted)
    (place / "text.txt").write_text("好" * 99)
    infer(["--adapter", "a", "--adapter", "none", "--ensemble", "--eval_dataset", "rows.jsonl", "--max_length", "9"])
    infer(["--adapter", "a", "--eval_dataset", "text.txt"])
    told, noted = capsys.readouterr()
    assert "2 个适配器的集成" in told and "困惑度" in told and not ENGLISH.search(told + noted)


def test_doctor_reports_in_chinese(chinese, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_failure_of_torch", lambda: None)
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run_doctor([])
    told = capsys.readouterr().out
    assert "本机" in told and "内存" in told and "建议处理：" in told and "HF_HOME" in told and not ENGLISH.search(told)


def test_a_page_is_chinese(chinese):
    answers = {"of": "held-out", "compared": True, "rows": []}
    answers["rows"] = [{"question": "很好", "expected": "正面", "before": "?", "after": "正面"}]
    wrong = [{"question": "很差", "expected": "负面", "before": "正面", "after": "正面", "loss": 1.5}]
    confusion = {"labels": ["正面", "负面"], "prompt": [[3, 1], [1, 3]], "base": [[4, 0], [4, 0]]}
    run = described_run(examples=answers, wrong=wrong, confusion=confusion)
    for html in (page([run]), page([run, described_run("other")])):
        told = Seen(html)
        assert '<html lang="zh-CN">' in html and "验证集损失" in told.text and "混淆矩阵" in told.text
        labels = " ".join(str(attributes.get("aria-label", "")) for _, attributes in told.elements)
        assert not ENGLISH.search(told.text.split('"use strict"')[0] + labels)


def test_a_chat_is_chinese(chinese, place):
    class Typist:
        keys, lines = "", ["/?", "/history", "/nope", "/adapters"]

        def read(self, prompt):
            if not self.lines:
                raise EOFError
            return self.lines.pop(0)

        def remember(self, message): ...

    shown = []
    model = softprompt.SoftPromptModel.from_pretrained(adapter=["a", "b"])
    hold_chat(ChatSession(model), Typist(), shown.append, True, str)
    told = "".join(shown)
    for text in ("请输入问题", "退出，同 Ctrl-D", "每个问题单独回答", "错误：没有命令 /nope", "3 个虚拟词元"):
        assert text in told
    assert not ENGLISH.search(told)
