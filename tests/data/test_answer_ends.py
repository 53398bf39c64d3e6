"""What ends an answer: the chat template's own token, else eos_token, and everything stops there."""

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM, GenerationConfig

import softprompt
from softprompt.data.template import Template
from softprompt.data.tokenization import end_tokens, tokenize
from softprompt.export.chat_template import add_prompt_tokens
from softprompt.export.plain_model import export
from softprompt.models.loading import base_path

HEAD = "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
TAIL = "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
THINKING = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n"
    "{% endif %}{{ m.content }}<|im_end|>\n" + TAIL
)
ROWS = [
    {"messages": [{"role": "user", "content": "题"}, {"role": "assistant", "content": text}]}
    for text in ("好", "坏", "", "x</s>")
]
TEMPLATES = {  # what is written behind an answer → the end that it is learned with, and the template's
    "eos": (HEAD + "{{ eos_token }}" + TAIL, "</s>", "</s>"),
    "none": (HEAD + "\n" + TAIL, "</s>", None),
    "another and a line break": (HEAD + "<|im_end|>\n" + TAIL, "<|im_end|>", "<|im_end|>"),
    "eos after the last turn only": (
        HEAD + "<|im_end|>\n{% if loop.last and not add_generation_prompt %}{{ eos_token }}{% endif %}" + TAIL,
        "<|im_end|>",
        "<|im_end|>",
    ),
    "thinking": (THINKING, "<|im_end|>", "<|im_end|>"),
    "never written": (HEAD + "<s>\n" + TAIL, "</s>", "<s>"),
    "words that are no token": (HEAD + "<|end|>\n" + TAIL, "</s>", None),
}


def tokenizer_with(template):
    from helpers.bases import make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_ends_with_one_special_token(name):
    text, learned, written = TEMPLATES[name]
    tokenizer, template = tokenizer_with(text), Template("chat")
    learned_id = tokenizer.convert_tokens_to_ids(learned)
    found = tokenize(ROWS, tokenizer, template, 64)
    for row, example in zip(ROWS, found.examples, strict=True):
        assert template.end(row, tokenizer) == written
        assert example.labels[-1] == learned_id
        assert template.answer(row, tokenizer).endswith(
            row["messages"][-1]["content"].strip("\n")
            + ("" if name != "words that are no token" else "<|end|>")
            + learned
        )
    written_id = [] if written is None else [tokenizer.convert_tokens_to_ids(written)]
    ends = end_tokens(found.examples, tokenizer, written)
    assert set(ends) == {learned_id, tokenizer.eos_token_id, *written_id} and ends[-1] == tokenizer.eos_token_id
    assert found.empty_answers == 1  # the row's own answer is empty, whatever the template writes around it


def test_a_row_may_end_in_what_looks_like_an_end():
    tokenizer = tokenizer_with(HEAD + "<|im_end|>\n" + TAIL)
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b</s> <|im_end|>"}]}
    assert Template("chat").answer(row, tokenizer) == "b</s> <|im_end|><|im_end|>"


@pytest.fixture
def run_of(tmp_path, monkeypatch, capsys):
    """Trains on chat rows with the mini base under a template of ours; returns the run and what was printed."""

    def run_of(template, **settings):
        monkeypatch.chdir(tmp_path)
        base = tmp_path / "base"
        shutil.copytree(base_path("mini"), base, dirs_exist_ok=True)
        (base / "chat_template.jinja").write_text(template, encoding="utf-8")
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS[:2] * 4)), encoding="utf-8")
        run = softprompt.train(
            model_name_or_path=str(base), dataset="rows.jsonl", template="chat", eval_rows=2, max_steps=60,
            gradient_accumulation_steps=1, learning_rate=0.1, output_dir="run", **settings,
        )  # fmt: skip
        return run, capsys.readouterr().out

    return run_of


@pytest.mark.parametrize("name, told", [("eos", ""), ("none", "warning: the chat template"), ("never written", "<s>")])
def test_answers_of_a_run_stop(name, told, run_of, tmp_path):
    run, printed = run_of(TEMPLATES[name][0])
    assert run.metrics["eval_exact_match"] == 0.5 or run.metrics["eval_exact_match"] == 1.0
    assert (told in printed) and (("chat template ends" in printed) == (name != "eos"))
    saved = json.loads((tmp_path / "run/softprompt.json").read_text())["generation"].get("eos_token_id")
    assert saved == ([1, 2] if name == "never written" else None)
    model = softprompt.SoftPromptModel.from_pretrained(adapter="run")
    assert model.settings().eos_token_id == tuple(saved or ())
    assert model.generate("题", do_sample=False, max_new_tokens=9) in ("好", "坏")
    export("run", "out")
    assert GenerationConfig.from_pretrained("out").eos_token_id == (saved or 2)


def test_saved_ends_may_be_a_number(tmp_path, tiny_base):
    from helpers.adapters import write_adapter

    write_adapter(tmp_path / "a", tiny_base, 2)
    of_base = GenerationConfig(do_sample=True, top_h=0.4, epsilon_cutoff=0.1, early_stopping=True, output_scores=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    shutil.copytree(tiny_base, tmp_path / "base")
    (tmp_path / "base/generation_config.json").write_text(json.dumps(of_base.to_dict()))
    for number, generation in enumerate(
        [{"eos_token_id": 2}, {"eos_token_id": [2, 3], "do_sample": False}, {"suppress_tokens": 5, "num_beams": 2}]
    ):
        (tmp_path / "a/softprompt.json").write_text(json.dumps({"generation": generation}))
        export(tmp_path / "a", tmp_path / f"out{number}", model_name_or_path=tmp_path / "base")
        ends = GenerationConfig.from_pretrained(tmp_path / f"out{number}").eos_token_id
        assert ends == generation.get("eos_token_id", model.generation_config.eos_token_id) or ends == [2]


def test_an_exported_template_takes_a_message_without_an_optional_column():
    tokenizer, template = tokenizer_with(None), Template("{a}{b}->", frozenset({"b"}))
    add_prompt_tokens(tokenizer, template, 1)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert text.endswith("x->")
