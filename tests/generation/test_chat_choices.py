"""Choices and labels are scored as the last message of a conversation, as the chat template renders the whole of it."""

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
from softprompt.generation.likelihood import answer_examples

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
    """Name of the chat template of the base under the adapter `a`."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "chat_template.jinja").write_text(TEMPLATES[request.param], encoding="utf-8")
    write_adapter(tmp_path / "a", base, 3, "chat", seed=1)
    monkeypatch.chdir(tmp_path)
    return request.param


def naive(model, name: str, question: str, choice: str) -> float:
    """log p of what the template writes after its generation prompt for the whole conversation, end token included."""
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
    assert [one.label for one in model.classify(asked, CHOICES)] == [CHOICES[row.index(max(row))] for row in expected]


def test_a_choice_takes_the_place_of_the_own_answer_of_a_row(chat):
    """A row of a dataset may end with its answer; messages of a question may not (see tests/data/test_messages.py)."""
    tokenizer, template = softprompt.SoftPromptModel.from_pretrained(adapter="a").tokenizer, Template("chat")
    asked, answered = conversation(chat, "好不好"), conversation(chat, "好不好", "别的")
    ids = tokenizer(template.render(asked, tokenizer))["input_ids"]
    rows, templates = [asked, answered], [template, template]
    of_question, of_row = answer_examples([ids, ids], rows, CHOICES, templates, tokenizer)
    assert of_question == of_row


def test_labels_are_the_texts_of_the_rows(chat, capsys, monkeypatch):
    written("rows.jsonl", [conversation(chat, *row) for row in ROWS])
    model = softprompt.SoftPromptModel.from_pretrained(adapter="a")
    results = model.classify([conversation(chat, question) for question, _ in ROWS], ["负面", "正面"])
    right = sum(one.label == answer for one, (_, answer) in zip(results, ROWS, strict=True))
    argv = ["--adapter", "a", "--eval_dataset", "rows.jsonl"]
    for choices in ([], ["--choices", "负面,正面"]):
        out = run_infer([*argv, *choices], capsys, monkeypatch)
        assert f"accuracy (most likely label)  {right / len(ROWS):.1%}" in out
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
    """Rows on which members disagree are scored in the same way."""
    write_adapter(tmp_path / "b", tmp_path / "base", 5, "chat", seed=2)
    write_adapter(tmp_path / "c", tmp_path / "base", 4, "chat", seed=3)
    written("rows.jsonl", [conversation(chat, *row) for row in ROWS])
    argv = [flag for name in "abc" for flag in ("--adapter", name)]
    out = run_infer([*argv, "--ensemble", "--eval_dataset", "rows.jsonl"], capsys, monkeypatch)
    assert "ensemble of 3:" in out and "exact match" in out


def test_a_generated_answer_keeps_a_single_think_block(tokenizer):
    """A generated answer contains what the template adds before an answer, since it follows the generation prompt."""
    before, tokenizer.chat_template = tokenizer.chat_template, TEMPLATES["think"]
    try:
        row, template = conversation("think", "你好"), Template("chat")
        chosen = template.answer(row, tokenizer, "正面")
        assert chosen == "<think>\n\n</think>\n\n正面" + tokenizer.eos_token
        assert template.answer(row, tokenizer, chosen.removesuffix(tokenizer.eos_token)) == chosen
        assert template.answer(row, tokenizer, "") == "<think>\n\n</think>\n\n" + tokenizer.eos_token
    finally:
        tokenizer.chat_template = before
