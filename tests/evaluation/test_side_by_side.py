"""Evaluation side by side: perplexity of plain texts, refused flags, answers outside the choices, adapters that fail."""

import math
import sys

import pytest
import torch
from helpers.programs import assert_line, jsonl, refused, run_infer

import infer
import softprompt
from softprompt.cli import run_command
from softprompt.data.encoding import passages
from softprompt.evaluation.side_by_side import AdapterEvaluator
from softprompt.utils.errors import ConfigError, DataError

TEXT = "Human: 我爱这部电影\n\nAssistant: 正面\r\n这家酒店太差了，hello\u2028 ok。\n" * 2


@torch.no_grad()
def naive_perplexity(model, prompt, ids, max_length):
    """Every token but the first is predicted by its own forward pass from the tokens before it in its passage."""
    logs, start = [], 0
    for at in range(1, len(ids)):
        if at - start == max_length:  # the passage is full: the next one begins with the token before this
            start = at - 1
        words = model.base.get_input_embeddings()(torch.tensor(ids[start:at]))
        words = words if prompt is None else torch.cat([prompt, words])
        logs.append(model.base(inputs_embeds=words[None]).logits[0, -1].double().log_softmax(-1)[ids[at]].item())
    return math.exp(-sum(logs) / len(logs))


@pytest.mark.parametrize("engine", ["packed", "padded"])
@pytest.mark.parametrize("max_length", [2, 7, 31, 1000])
def test_perplexity_of_a_plain_text(max_length, engine, place, capsys, monkeypatch):
    (place / "t.TXT").write_bytes(TEXT.encode())
    flags = ["--adapter", "x=a", "--adapter", "b", "--adapter", "none", "--eval_dataset", "t.TXT", "--engine", engine]
    out = run_infer([*flags, "--max_length", max_length], capsys, monkeypatch)
    head, _, *figures = out.splitlines()
    assert head.split() == ["x", "b", "none"] and [line.split()[0] for line in figures] == ["loss", "perplexity"]
    model = softprompt.SoftPromptModel.from_pretrained(adapter={"x": "a", "b": "b"})
    ids, prompts = model.tokenizer(TEXT)["input_ids"], [model.adapters["x"].prompt, model.adapters["b"].prompt, None]
    expected = [naive_perplexity(model, prompt, ids, max_length) for prompt in prompts]
    found = [float(value.replace(",", "")) for value in figures[1].split()[1:]]
    assert found == pytest.approx(expected, rel=1e-3)  # four digits are shown


def test_passages_predict_every_token_but_the_first_once(tmp_path, tokenizer):
    (tmp_path / "t.txt").write_bytes(TEXT.encode())
    ids = tokenizer(TEXT)["input_ids"]
    for max_length in (2, 3, 10, len(ids) - 1, len(ids), len(ids) + 1):
        made = passages(str(tmp_path / "t.txt"), tokenizer, max_length)
        assert [label for one in made for label in one.labels[1:]] == ids[1:]
        assert all(one.labels[0] == -100 and 2 <= len(one.input_ids) <= max_length for one in made)


def test_texts_without_a_token_to_predict(tmp_path, tokenizer):
    (tmp_path / "t.txt").write_text("a", encoding="utf-8")
    with pytest.raises(DataError, match=r"t.txt: its text has 1 tokens; expected at least 2"):
        passages(str(tmp_path / "t.txt"), tokenizer, 9)
    with pytest.raises(ConfigError, match="--max_length 1 leaves a passage"):
        passages(str(tmp_path / "t.txt"), tokenizer, 1)


ROWS = [{"instruction": "今天", "output": "正面"}, {"instruction": "明天", "output": "ok"}]
# ruff: noqa: E501 (a table reads best with a case a line)
EVALUATIONS = {
    "--choices 好,坏 --eval_dataset rows.jsonl": "--choices 好,坏: no row of rows.jsonl has one of them as its answer; the first has '正面'",
    "--choices 正面 --eval_dataset rows.jsonl": "--choices 正面: expected two or more different answers",
    "--choices 正面,负面 --eval_dataset t.txt": "--choices needs rows with answers, and t.txt is a plain text",
    "--eval_dataset none.txt": "--eval_dataset none.txt: no such file",
    "--eval_dataset blank.txt": "blank.txt is empty",
    "--eval_dataset gbk.txt": "gbk.txt, line 1: not UTF-8",
    "--eval_dataset t.txt --max_length 1": "--max_length 1 leaves a passage of t.txt nothing to predict",
}  # fmt: skip


@pytest.mark.parametrize("flags", EVALUATIONS)
def test_refused_evaluations(flags, place, capsys, monkeypatch):
    (place / "rows.jsonl").write_bytes(jsonl(*ROWS))
    (place / "t.txt").write_text("一段话", encoding="utf-8")
    (place / "blank.txt").write_text(" \n")
    (place / "gbk.txt").write_bytes("一段话".encode("gbk"))
    line = refused(infer, ["--adapter", "a", *flags.split()], capsys, monkeypatch, place)
    assert_line(line, EVALUATIONS[flags])


def test_an_answer_outside_the_choices_counts_as_wrong(place, capsys, monkeypatch):
    (place / "rows.jsonl").write_bytes(jsonl(*ROWS))
    out = run_infer(["--adapter", "a", "--choices", "负面, 正面", "--eval_dataset", "rows.jsonl"], capsys, monkeypatch)
    assert out.splitlines()[-1].startswith("1 of 2 rows") and "'ok'" in out.splitlines()[-1]
    assert [line.split()[0] for line in out.splitlines()[-5:-2]] == ["负面", "正面", "ok"]
    model = softprompt.SoftPromptModel.from_pretrained(adapter="a")
    right = model.classify(["今天"], ["负面", "正面"])[0].label == "正面"
    assert f"accuracy (most likely label)  {right / 2:.1%}" in out


@pytest.mark.parametrize("ensemble", [[], ["--ensemble"]])
@pytest.mark.parametrize("fault", ["its template needs a column q", "out of memory"])
def test_an_adapter_that_fails_is_named_and_the_others_are_shown(fault, ensemble, place, capsys, monkeypatch):
    rows, real = ROWS, AdapterEvaluator.__call__
    if fault == "out of memory":
        rows = [{**row, "q": row["instruction"]} for row in ROWS]

        def evaluate(self, adapter):
            if "{q}" in adapter.template.spec:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return real(self, adapter)

        monkeypatch.setattr(AdapterEvaluator, "__call__", evaluate)
    (place / "rows.jsonl").write_bytes(jsonl(*rows))
    flags = ["--adapter", "x=a", "--adapter", "b", "--adapter", "none", *ensemble, "--eval_dataset", "rows.jsonl"]
    monkeypatch.setattr(sys, "argv", ["infer.py", *flags])
    with pytest.raises(SystemExit) as ended:
        run_command(infer.main)
    captured = capsys.readouterr()
    assert ended.value.code == 1 and captured.out.splitlines()[0].split() == ["x", "none"]
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert "1 of 3 adapters" in line and "(b: " in line
