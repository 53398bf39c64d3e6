"""Choices and labels stand behind the row's own messages, as a chat template renders the whole conversation."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.adapters import write_adapter
from helpers.peers import naive_loss
from helpers.programs import read_jsonl, run_infer

import softprompt
from softprompt.data.template import Template
from softprompt.data.tokenization import Example

ANSWER = "答：%s{{ m.content }}{{ eos_token }}"
TURN = "{% if m.role == 'assistant' %}" + ANSWER + "{% else %}{{ m.role }}：{{ m.content }}{% endif %}\n"
LOOP = "{% for m in messages %}" + TURN + "{% endfor %}{% if add_generation_prompt %}答：{% endif %}"
EMPTY = "{% for m in messages %}{% if not m.content|trim %}{{ raise_exception('empty') }}{% endif %}{% endfor %}"
SYSTEM = "{% if messages[0].role != 'system' %}{{ raise_exception('no system message') }}{% endif %}"
THINK = "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}"
TEMPLATES = {
    "plain": LOOP.replace("%s", ""),
    "strict": EMPTY + LOOP.replace("%s", ""),
    "system": SYSTEM + LOOP.replace("%s", ""),
    "think": LOOP.replace("%s", THINK),
}
CHOICES = ["正面", "负面", "ok"]
ROWS = [(f"第{n}天", "正面" if n % 3 else "负面") for n in range(6)]


def conversation(name: str, question: str, answer: str | None = None) -> dict:
    said = [("system", "判断")] if name == "system" else []
    said += [("user", "你好"), ("assistant", "好"), ("user", question)]
    said += [] if answer is None else [("assistant", answer)]
    return {"messages": [{"role": role, "content": text} for role, text in said]}


@pytest.fixture(params=TEMPLATES)
def chat(request, tiny_base, tmp_path, monkeypatch) -> str:
    """The name of a template that the base of the adapter `a` has."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "chat_template.jinja").write_text(TEMPLATES[request.param], encoding="utf-8")
    write_adapter(tmp_path / "a", base, 3, "chat", seed=1)
    monkeypatch.chdir(tmp_path)
    return request.param


def naive(model, name: str, question: str, choice: str) -> float:
    """log p of what the template writes behind its generation prompt for the whole conversation, its end included."""
    tokenizer, messages = model.tokenizer, conversation(name, question, choice)["messages"]
    asked = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n")
    assert whole.startswith(asked) and whole.count("<think>") == (name == "think")
    ids, end = tokenizer(asked)["input_ids"], tokenizer(whole[len(asked) :])["input_ids"]
    return -naive_loss(model.base, model.prompt, [Example(ids + end, [-100] * len(ids) + end)]).item() * len(end)


def written(path: str, rows: list[dict]) -> str:
    Path(path).write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_likelihoods_are_those_of_the_whole_conversation(chat):
    model = softprompt.SoftPromptModel.from_pretrained(adapter="a")
    asked = [conversation(chat, question) for question, _ in ROWS[:2]]
    found = model.log_likelihoods(asked, CHOICES)
    expected = [[naive(model, chat, question, choice) for choice in CHOICES] for question, _ in ROWS[:2]]
    assert torch.tensor(found).allclose(torch.tensor(expected), atol=1e-3)
    answered = [conversation(chat, question, "别的") for question, _ in ROWS[:2]]  # the choice takes its place
    assert torch.tensor(model.log_likelihoods(answered, CHOICES)).allclose(torch.tensor(expected), atol=1e-3)
    assert [one.label for one in model.classify(asked, CHOICES)] == [CHOICES[row.index(max(row))] for row in expected]


def test_labels_are_the_texts_of_the_rows(chat, capsys, monkeypatch):
    written("rows.jsonl", [conversation(chat, *row) for row in ROWS])
    model = softprompt.SoftPromptModel.from_pretrained(adapter="a")
    verdicts = model.classify([conversation(chat, question) for question, _ in ROWS], ["负面", "正面"])
    right = sum(one.label == answer for one, (_, answer) in zip(verdicts, ROWS, strict=True))
    argv = ["--adapter", "a", "--eval_dataset", "rows.jsonl"]
    for choices in ([], ["--choices", "负面,正面"]):
        out = run_infer([*argv, *choices], capsys, monkeypatch)
        assert f"accuracy (likelier label)  {right / len(ROWS):.1%}" in out
        assert [line.split()[0] for line in out.splitlines()[-2:]] == ["负面", "正面"]


def test_choices_of_prompts(chat, capsys, monkeypatch):
    model = softprompt.SoftPromptModel.from_pretrained(adapter="a")
    argv = ["--adapter", "a", "--choices", ",".join(CHOICES)]
    expected = [one.label for one in model.classify([conversation(chat, question) for question, _ in ROWS], CHOICES)]
    written("p.jsonl", [conversation(chat, question) for question, _ in ROWS])
    run_infer([*argv, "--prompts_file", "p.jsonl", "--output_file", "out.jsonl"], capsys, monkeypatch)
    assert [line["text"] for line in read_jsonl(Path("out.jsonl"))] == expected
    if chat != "system":
        assert run_infer([*argv, "--prompt", "很好"], capsys, monkeypatch).split()[0] in CHOICES


def test_an_ensemble_of_conversations(chat, tmp_path, capsys, monkeypatch):
    """Members that disagree are scored behind the rows, too."""
    write_adapter(tmp_path / "b", tmp_path / "base", 5, "chat", seed=2)
    write_adapter(tmp_path / "c", tmp_path / "base", 4, "chat", seed=3)
    written("rows.jsonl", [conversation(chat, *row) for row in ROWS])
    argv = [flag for name in "abc" for flag in ("--adapter", name)]
    out = run_infer([*argv, "--ensemble", "--eval_dataset", "rows.jsonl"], capsys, monkeypatch)
    assert "ensemble of 3:" in out and "exact match" in out


def test_a_generated_answer_is_not_given_twice_what_the_template_adds(tokenizer):
    """It has that already, as it was generated behind the generation prompt."""
    before, tokenizer.chat_template = tokenizer.chat_template, TEMPLATES["think"]
    try:
        row, template = conversation("think", "你好"), Template("chat")
        chosen = template.answer(row, tokenizer, "正面")
        assert chosen == "<think>\n\n</think>\n\n正面" + tokenizer.eos_token
        assert template.answer(row, tokenizer, chosen.removesuffix(tokenizer.eos_token)) == chosen
        assert template.answer(row, tokenizer, "") == "<think>\n\n</think>\n\n" + tokenizer.eos_token
    finally:
        tokenizer.chat_template = before
