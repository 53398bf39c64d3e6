"""Every command that is printed works as it stands: in a shell, whatever the rows and the folders are called."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.bases import make_tokenizer

import infer
import train
from softprompt.cli import run_command
from softprompt.config.command_line import parse_inference, parse_training
from softprompt.config.train_args import SharingArguments
from softprompt.data.dataset import load_prompts, question
from softprompt.data.template import Template, saved_template
from softprompt.export.push_args import parse_push
from softprompt.export.push_to_hub import upload_command
from softprompt.report.args import parse_report
from softprompt.runs.train_state import resume_command
from softprompt.training.first_question import first_question
from softprompt.training.summary import infer_command
from softprompt.utils.shell_commands import argument, command, flag, program_name

ROOT = Path(__file__).parents[2]
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
NEEDS_SYSTEM = "{% if messages[0].role != 'system' %}{{ raise_exception('no system message') }}{% endif %}" + CHAT
TEXTS = [
    "a",
    'say "hi" it\'s',
    "a\\nb\\",
    "--prompt",
    "-5",
    "$HOME `id` !! $(id)",
    "a\nb",
    "a\tb",
    "长" * 500,
    "=x",
]


def conversation(*pairs):
    return {"messages": [{"role": role, "content": text} for role, text in pairs]}


def asked_in_a_shell(question_, folder: Path, output_dir: str = "run", labels=(), base: str = "base"):
    """What `infer` understands of the printed command, as bash splits it."""
    (folder / output_dir).mkdir(exist_ok=True)
    if question_.flags is None:
        (folder / output_dir / "question.jsonl").write_text(json.dumps(question_.row), encoding="utf-8")
    model = SimpleNamespace(load_in_8bit=False, load_in_4bit=False, model_name_or_path=base)
    after = SimpleNamespace(classification=SimpleNamespace(labels=labels) if labels else None)
    run = SimpleNamespace(config=SimpleNamespace(model=model), output_dir=Path(output_dir), after=after)
    line = infer_command(run, question_)
    start = "python -m softprompt infer"
    assert line.startswith(f"{start} --adapter") and "\n" not in line
    code = "import json, sys; print(json.dumps(sys.argv[1:]))"
    shell = line.replace(start, f"{shlex.quote(sys.executable)} -c {shlex.quote(code)}", 1)
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, cwd=folder, check=True)
    return parse_inference(json.loads(done.stdout))


def rendered(config, template, tokenizer):
    if config.question.prompts_file is None:
        return template.render(template.row(config.question.prompt, config.question.input), tokenizer)
    ((where, row),) = load_prompts(config.question.prompts_file)
    return template.render(question(where, row, template), tokenizer)


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_a_text_of_any_kind(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row, template = {"instruction": text, "input": "", "output": "x"}, Template("{instruction}->")
    config = asked_in_a_shell(first_question([row], template, None), tmp_path)
    assert rendered(config, template, None) == f"{text}->" and config.model.adapter == ["run"]


@pytest.mark.parametrize("name", ["a b", "-x", "none", "a=b", ".x", "中 'q\" $HOME", "newest"])
def test_a_folder_of_any_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = {"instruction": "a", "input": "", "output": "x"}
    config = asked_in_a_shell(first_question([row], Template(), None), tmp_path, name)
    assert [os.path.normpath(folder) for folder in config.model.adapter] == [name] != ["none"] or name == "none"
    assert config.model.adapter != ["none"]
    monkeypatch.setattr(sys, "argv", ["train.py"])
    resumed = parse_training(shlex.split(resume_command(Path(name)))[2:])
    assert resumed.training.resume_from_checkpoint != "newest"
    assert os.path.normpath(resumed.training.resume_from_checkpoint) == name
    runs, *_ = parse_report(shlex.split(argument(name)))
    assert [os.path.normpath(run) for run in runs] == [name]
    program, pushed = [], shlex.split(upload_command("me/it", Path(name), SharingArguments()))
    while pushed[0] != "push":
        program.append(pushed.pop(0))
    folder, sharing = parse_push(pushed[1:])
    assert program == ["python", "-m", "softprompt"] and sharing.hub_model_id == "me/it"
    assert os.path.normpath(folder) == name


@pytest.mark.parametrize(
    ("labels", "base", "choices"),
    [
        (["正面", "it's"], "base", ["正面", "it's"]),
        (["正面", "负面"], "mini", None),  # its answers are greedy by default
        (["a,b", "c"], "base", None),
        (["a\nb", "c"], "base", None),
        (["长" * 80, "短" * 80], "base", None),
        ([], "base", None),
    ],
)
def test_a_run_on_labels_is_asked_to_choose_where_answers_are_sampled(labels, base, choices, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = first_question([{"instruction": "a", "output": "x"}], Template(), None)
    config = asked_in_a_shell(asked, tmp_path, labels=labels, base=base)
    assert config.question.choice_list == choices


COLUMNS = [  # template, rows, the question's text in the template
    ("{q}|{c}|", [{"q": "a", "c": "x"}, {"q": "bbbb", "c": ""}], "a|x|"),
    ("{q}|{c}|", [{"q": "aaaa", "c": "x"}, {"q": "b", "c": ""}], "b||"),
    ("{q}|{input}|", [{"q": "a", "input": ""}], "a||"),
    ("{c}|{q}|", [{"q": "a", "c": "-c"}], "-c|a|"),
    ("{a}|{b}|{c}|", [{"a": "a", "b": "b", "c": "c"}], "a|b|c|"),
    ("{a}|{b}|{c}|", [{"a": "a", "b": "b", "c": ""}], "a|b||"),
    ("{a}|{b}|", [{"a": "", "b": "b"}, {"a": "aaaa", "b": "b"}], "aaaa|b|"),
    ("{a}|{b}|", [{"a": " ", "b": "b"}], " |b|"),
    ("{prompt}|{ctx}|", [{"prompt": "p", "ctx": "c\nd"}], "p|c\nd|"),
    ("default", [{"instruction": "", "input": "abc"}], "Human: \nabc\n\nAssistant: "),
]


@pytest.mark.parametrize("spec, rows, text", COLUMNS)
def test_columns_of_any_kind(spec, rows, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    template = Template(spec).of_rows(rows)
    config = asked_in_a_shell(first_question(rows, template, None), tmp_path)
    assert rendered(config, template, None) == text


def test_rows_without_any_question_have_no_command():
    assert first_question([{"q": ""}, {"q": " "}], Template("{q}?"), None) is None


CONVERSATIONS = [  # the tokenizer's template, messages, what is asked
    (CHAT, [("system", "s"), ("user", "u"), ("assistant", "a")], "<user>u</s>"),
    (CHAT, [("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "a")], "<user>v</s>"),
    (NEEDS_SYSTEM, [("system", "s"), ("user", "u"), ("assistant", "a")], "<system>s</s><user>u</s>"),
]


@pytest.mark.parametrize("chat_template, pairs, text", CONVERSATIONS)
def test_of_a_conversation_the_last_user_message_is_asked(chat_template, pairs, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer, template = make_tokenizer(), Template("chat")
    tokenizer.chat_template = chat_template
    empty = conversation(("system", "s"), ("user", ""), ("assistant", "a"))
    config = asked_in_a_shell(first_question([empty, conversation(*pairs)], template, tokenizer), tmp_path)
    assert rendered(config, template, tokenizer) == text


def test_commands_of_a_script_name_the_scripts_beside_it(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["../my code/train.py"])
    assert command("infer") == "python '../my code/infer.py'"
    assert resume_command(Path("run")) == "python '../my code/train.py' --resume_from_checkpoint run"
    monkeypatch.setattr(sys, "path", ["/x"])
    assert command("report") == "PYTHONPATH='../my code' python -m softprompt report"
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert command("infer") == "python infer.py" and command("report") == "python -m softprompt report"
    assert program_name("train") == "train.py"


def test_commands_of_the_installed_command_name_it(tmp_path, monkeypatch):
    installed = tmp_path / "my bin" / "softprompt"
    installed.parent.mkdir()
    installed.write_text("#!/bin/sh\n")
    installed.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(installed)])
    monkeypatch.setenv("PATH", str(installed.parent))
    assert resume_command(Path("run")) == "softprompt train --resume_from_checkpoint run"
    assert program_name("train") == "softprompt train"
    assert command("train", "torchrun --nproc_per_node=2") == "torchrun --nproc_per_node=2 -m softprompt train"
    monkeypatch.setenv("PATH", "")
    assert shlex.split(command("infer")) == [str(installed), "infer"]


def test_commands_of_the_module_and_of_python_name_the_module(monkeypatch):
    for started in ("/x/softprompt/__main__.py", "notebook", ""):
        monkeypatch.setattr(sys, "argv", [started])
        assert command("infer") == "python -m softprompt infer"


def test_a_value_that_looks_like_a_flag_is_joined_to_its_flag():
    assert flag("adapter", "-x y") == ' --adapter="-x y"'


@pytest.fixture
def shell(tiny_base, tmp_path):
    """Run argv, or a line in bash, in a folder with rows and without the scripts; return its stdout and stderr."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"instruction": "a", "output": "x"}) + "\n")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path}
    flags = ["--model_name_or_path", str(tiny_base), "--dataset", "rows.jsonl", "--output_dir", "my run"]

    def run(line: str | list[str], code: int = 0) -> tuple[str, str]:
        argv = (
            ["bash", "-c", line] if isinstance(line, str) else [sys.executable, *line[:-1], *flags, *line[-1].split()]
        )
        ran = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, env=env)
        assert ran.returncode == code, ran.stderr
        return ran.stdout, ran.stderr

    return run


def test_what_a_run_of_the_command_says_to_try_runs(shell):
    out, _ = shell(["-m", "softprompt", "train", "--max_steps 1"])
    (line,) = [line.removeprefix("Try: ") for line in out.splitlines() if line.startswith("Try: ")]
    answer, err = shell(f"{line} --max_new_tokens 2")
    assert answer and "adapter my run" in err


def test_what_a_stopped_run_of_the_script_says_goes_on(shell, tmp_path):
    _, err = shell([str(ROOT / "train.py"), "--max_steps 1000000 --max_time 1s"], 124)
    states = (tmp_path / "my run").glob("checkpoint-*/trainer_state.json")
    last = 1 + max(json.loads(state.read_text())["step"] for state in states)
    shell(f"{err.rpartition('continue with: ')[2].strip()} --max_steps {last}")
    assert (tmp_path / f"my run/checkpoint-{last}").is_dir()


def ended(program, argv, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *argv])
    with pytest.raises(SystemExit) as end:
        run_command(program.main)
    out = capsys.readouterr()
    assert end.value.code == 0, out.err
    return out.out


@pytest.mark.parametrize("output", ["", "好"])
def test_what_may_be_empty_in_training_may_be_empty_in_a_question(output, tiny_base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"q": f"第{i}题\n", "c": "", "output": "x"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = ["--model_name_or_path", str(tiny_base), "--dataset", "rows.jsonl", "--template", "{q}{c}->"]
    out = ended(train, [*argv, "--max_steps", "1", "--output_dir", "run"], capsys, monkeypatch)
    assert saved_template(json.loads(Path("run/softprompt.json").read_text())).optional == {"c"}
    (line,) = [line for line in out.splitlines() if line.startswith("Try: ")]
    short = ["--max_new_tokens", "2"]
    for asked in (shlex.split(line)[3:], ["--adapter", "run", "--prompt", "a"]):
        ended(infer, [*asked, *short], capsys, monkeypatch)
    ended(infer, ["--adapter", "run", "--prompt", "a", "--input", output, *short], capsys, monkeypatch)
