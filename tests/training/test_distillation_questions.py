"""The questions and the text of a distillation, and what it refuses."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers import watched
from helpers.adapters import write_adapter
from helpers.distillation import CHAT, QUESTIONS, TEXT, chat_base, counted_requests
from helpers.distributed import ranks_of
from helpers.programs import assert_line, listing, refused
from helpers.short_runs import interrupted, outcome
from helpers.small_bases import small_base
from tokenizers.processors import TemplateProcessing

import softprompt
import train
from softprompt.config.loader import train_config
from softprompt.engines import choice
from softprompt.generation.continuous_batching import ContinuousBatchingGenerator
from softprompt.models.loading import load_tokenizer, read_base
from softprompt.prompt.adapter_io import load_adapter
from softprompt.training import question_setup, teacher_answers
from softprompt.training.question_setup import load_questions, load_text
from softprompt.utils.errors import SoftpromptError


@pytest.mark.parametrize("form", ["rows", "columns", "conversations"])
def test_answers_of_rows_are_not_used(form, distillation, capsys):
    rows = [{"instruction": q, "output": "不对"} for q in QUESTIONS]
    more = {}
    if form == "columns":
        rows, more = [{"q": q, "a": "不对"} for q in QUESTIONS], {"columns": "instruction=q,output=a"}
    if form == "conversations":
        asked = ({"role": "user", "content": q} for q in QUESTIONS)
        rows = [{"messages": [each, {"role": "assistant", "content": "不对"}]} for each in asked]
        more = {"template": "chat", "model_name_or_path": chat_base(distillation["model_name_or_path"], CHAT)}
        distillation |= more
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ours = softprompt.train(**{**distillation, "dataset": "rows.jsonl", **more})
    plain = softprompt.train(**{**distillation, "output_dir": "plain"})
    assert ours.setup.data.train.examples == plain.setup.data.train.examples
    assert outcome("run")[0] == outcome("plain")[0]
    assert capsys.readouterr().out.count("are not used") == 1


def test_the_text_is_the_system_message_of_a_chat(distillation, tiny_base):
    base = chat_base(tiny_base, CHAT)
    asked = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "x"}]} for q in QUESTIONS]
    own = [{"role": "system", "content": "短"}, {"role": "user", "content": "嗯"}]
    Path("chats.jsonl").write_text("\n".join(map(json.dumps, [{"messages": own}, *asked])))
    run = softprompt.train(**{**distillation, "dataset": "chats.jsonl", "model_name_or_path": base, "template": "chat"})
    tokenizer = load_tokenizer(base)
    row, questions = run.setup.data.held_out.examples[-1], run.evaluator.text
    assert tokenizer.decode(row.input_ids).startswith(f"<user>{QUESTIONS[-1]}</s><a>")
    assert tokenizer.decode(questions.prefix).startswith(f"<system>{TEXT}")
    cut = tokenizer.decode(run.evaluator.with_cut_text[-1].input_ids)
    assert cut.startswith("<system>请") and f"</s><user>{QUESTIONS[-1]}</s><a>" in cut and TEXT not in cut


@pytest.mark.parametrize("source", ["questions", "text alone"])
def test_a_chat_without_held_out_questions(source, distillation, tiny_base):
    if source == "text alone":
        distillation |= {"distill_context": distillation.pop("distill_prompt"), "distill_questions": 4}
        del distillation["dataset"]
    del distillation["eval_rows"]
    base = chat_base(tiny_base, CHAT)
    run = softprompt.train(**{**distillation, "model_name_or_path": base, "template": "chat"})
    assert run.evaluator is None and run.metrics["answers"] > 0


def test_a_text_that_begins_with_the_system_message_of_the_chat_template(distillation, tiny_base):
    """Some templates write one where there is none. The text cut to it equals no text, which is no fault."""
    tokenizer, usual = load_tokenizer(tiny_base), "请用"
    P = len(tokenizer(usual, add_special_tokens=False)["input_ids"])
    Path("text.txt").write_text(f"{usual}一句话回答", encoding="utf-8")
    default = f"{{% if messages[0].role != 'system' %}}<system>{usual}</s>{{% endif %}}"
    base = chat_base(tiny_base, default + CHAT)
    more = {"model_name_or_path": base, "template": "chat", "num_virtual_tokens": P}
    run = softprompt.train(**{**distillation, **more})
    assert run.metrics["eval_kl_cut"] == run.metrics["eval_kl_base"] > 0


def test_the_base_writes_the_questions_about_a_document(distillation, capsys, monkeypatch):
    """The questions are kept as the answers are, and a resumed run has the same ones."""
    del distillation["dataset"], distillation["distill_prompt"]
    document = "这是一份很长的文件，讲酒店的房间、早餐和停车。" * 12
    Path("text.txt").write_text(document, encoding="utf-8")
    more = {"distill_context": "text.txt", "distill_questions": 7, "eval_rows": 2, "num_virtual_tokens": 3}
    run = softprompt.train(**{**distillation, **more, "output_dir": "whole"})
    asked = [row["instruction"] for row in run.setup.data.first_rows]
    assert len(asked) == 5 == len(set(asked)) and run.setup.data.held_out.rows == 2
    assert "the base wrote 7 of the 7 requested questions" in capsys.readouterr().out
    assert "that replace the text of text.txt" in Path("whole/report.html").read_text()
    interrupted({**distillation, **more}, 3)
    softprompt.train(resume_from_checkpoint="run")
    assert outcome("run")[0] == outcome("whole")[0]
    assert "so that the base answers as with a long text" in Path("run/README.md").read_text()
    asked = counted_requests(monkeypatch)
    Path("text.txt").write_text("另一份文件，讲别的事情。" * 12, encoding="utf-8")
    with pytest.raises(SoftpromptError, match="distilled text"):
        softprompt.train(resume_from_checkpoint="run", max_steps=6)
    assert not asked


@pytest.mark.parametrize(("count", "few"), [(2, True), (4, False)])
def test_a_base_that_writes_few_questions_is_told_of(count, few, distillation, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(question_setup, "written_questions", lambda *_: QUESTIONS[:count])
    distillation |= {"distill_context": distillation.pop("distill_prompt"), "distill_questions": 7, "eval_rows": 1}
    del distillation["dataset"]
    softprompt.train(**distillation)
    out = capsys.readouterr().out
    assert f"the base wrote {count} of the 7" in out and ("warning: so few questions" in out) == few
    assert f"answers with the text: {2 * (count - 1)} to generate" in out


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"distill_prompt": "none.txt"}, "none.txt: no such file"),
        ({"distill_prompt": "empty.txt"}, "empty.txt is empty; write the text"),
        ({"num_virtual_tokens": 500}, "fewer than the 500 virtual tokens"),
        ({"dataset": "empty.txt"}, "empty.txt is empty"),
        ({"eval_rows": 9}, "leaves none"),
        ({"dataset": None}, "--distill_prompt text.txt needs questions"),
        ({"dataset": None, "model_name_or_path": None}, "--distill_prompt text.txt needs questions"),
        ({"dataset": "some.jsonl", "template": "{instruction}"}, "question 2 has no tokens"),
        ({"dataset_split": "test"}, "questions.txt has no splits; leave --dataset_split out"),
        ({"eval_rows": None, "eval_split": "test"}, "questions.txt has no splits; leave --eval_split out"),
        ({"distill_samples": 0}, "--distill_samples 0"),
        ({"distill_context": "text.txt"}, "exclude each other"),
        ({"distill_prompt": None}, "--distill_samples is only used with --distill_prompt"),
        ({"streaming": True}, "--streaming excludes --distill_prompt"),
        ({"metric_for_best_model": "exact_match"}, "--metric_for_best_model exact_match"),
        ({"max_length": 5}, "no question leaves room for an answer at --max_length 5"),
        (
            {"eval_rows": None, "eval_dataset": "long.txt"},
            "no held-out question leaves room for an answer at --max_len",
        ),
        ({"truncation_side": "input"}, "--truncation_side input"),
        ({"template": "chat"}, "no chat template"),
        ({"prompt_tuning_init": "CLASS_LABELS"}, "--class_labels"),
        ({"model_name_or_path": "short"}, "shorten the text"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(change, named, distillation, tokenizer):
    Path("empty.txt").write_text(" \n")
    Path("long.txt").write_text("很" * 300, encoding="utf-8")
    Path("some.jsonl").write_text("\n".join(json.dumps({"instruction": each}) for each in ("a", "", "b", "c", "d")))
    if change.get("model_name_or_path") == "short":
        small_base("gpt2", n_positions=16).save_pretrained("short")
        tokenizer.save_pretrained("short")
    distillation = {name: value for name, value in {**distillation, **change}.items() if value is not None}
    with pytest.raises(SoftpromptError, match=named) as refused:
        softprompt.train(**distillation)
    assert "\n" not in str(refused.value) and not Path("run").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"max_length": 118}, "4 virtual tokens and 118 of text need more than the 120 positions"),
        ({"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "<more>"}, "--prompt_tuning_init_text: token id"),
        ({"init_adapter": "other", "num_virtual_tokens": None}, "virtual tokens have size"),
        ({"init_adapter": "long", "num_virtual_tokens": None}, "fewer than the 90 virtual tokens"),
    ],
)
@pytest.mark.parametrize("source", ["questions", "text alone"])
def test_a_prompt_that_cannot_be_trained_is_refused_before_the_base_answers(
    source, change, named, distillation, tiny_base, monkeypatch
):
    small_base("gpt2", n_positions=120).save_pretrained("short")
    tokenizer = load_tokenizer(tiny_base)
    tokenizer.add_tokens("<more>")
    tokenizer.save_pretrained("short")
    write_adapter(Path("other"), hidden_size=16, P=4)
    write_adapter(Path("long"), P=90)
    if source == "text alone":
        distillation |= {"distill_context": distillation.pop("distill_prompt"), "dataset": None}
    asked = []
    monkeypatch.setattr(teacher_answers, "_generate", lambda *given: asked.append(given))
    settings = {**distillation, "model_name_or_path": "short", **change}
    with pytest.raises(SoftpromptError, match=named) as refused:
        softprompt.train(**{name: value for name, value in settings.items() if value is not None})
    assert "\n" not in str(refused.value) and not asked and not Path("run").exists()


@pytest.mark.parametrize("source", ["questions", "text alone"])
def test_an_engine_that_fails_its_check_is_refused_before_the_base_answers(source, distillation, monkeypatch):
    if source == "text alone":
        distillation |= {"distill_context": distillation.pop("distill_prompt")}
        del distillation["dataset"]
    asked = []
    monkeypatch.setattr(teacher_answers, "_generate", lambda *given: asked.append(given))
    monkeypatch.setattr(choice.CheckResult, "is_right", lambda *_: False)
    with pytest.raises(SoftpromptError, match=r"--engine packed: .*; give --engine auto") as refused:
        softprompt.train(**distillation, engine="packed")
    assert "\n" not in str(refused.value) and not asked and not Path("run").exists()


def test_a_text_that_is_longer_than_any_row_does_not_fail_the_check_of_an_engine(distillation, tokenizer):
    small_base("gpt2", n_positions=110).save_pretrained("short")
    tokenizer.save_pretrained("short")
    text = "请用一句话回答客人的问题。" * 2
    Path("text.txt").write_text(text, encoding="utf-8")
    assert 40 + len(tokenizer(text, add_special_tokens=False)["input_ids"]) > 110
    more = {"model_name_or_path": "short", "engine": "packed", "num_virtual_tokens": 40, "template": "{instruction}"}
    softprompt.train(**{**distillation, **more})
    softprompt.train(resume_from_checkpoint="run/checkpoint-2", output_dir="again")


def test_a_text_whose_beginning_is_white_space(distillation, tiny_base, monkeypatch):
    """Cut to that, it is an empty system message, which chat templates may refuse or leave out."""
    text = "\n" * 12 + TEXT
    tokenizer = load_tokenizer(tiny_base)
    assert not tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][:4]).strip()
    Path("text.txt").write_text(text, encoding="utf-8")
    template = CHAT.replace("<{{ m.role }}>", "{% if m.content %}<{{ m.role }}>").replace("</s>", "</s>{% endif %}")
    base = chat_base(tiny_base, template)
    run = softprompt.train(**{**distillation, "model_name_or_path": base, "template": "chat"})
    assert [row.input_ids for row in run.evaluator.with_cut_text] == [row.input_ids for row in run.evaluator.answers]
    assert run.metrics["eval_kl_cut"] == run.metrics["eval_kl_base"]


def as_flags(settings: dict) -> list[str]:
    """The flags of train.py for settings of a run."""
    return [str(word) for name, value in settings.items() for word in (f"--{name}", value)]


@pytest.mark.parametrize("text", ["distill_prompt", "distill_context"])
@pytest.mark.parametrize("flag", ["--streaming", "--stream_base", "--shard_base"])
def test_what_distillation_excludes_is_refused_by_the_program(flag, text, distillation, tmp_path, capsys, monkeypatch):
    distillation[text] = distillation.pop("distill_prompt")
    line = refused(train, [*as_flags(distillation), flag], capsys, monkeypatch, tmp_path)
    assert_line(line, f"{flag} excludes --distill_prompt and --distill_context, because .*; give one of them")


@pytest.mark.parametrize("text", ["distill_prompt", "distill_context"])
def test_distillation_by_several_processes_is_refused(text, distillation, tmp_path):
    distillation[text] = distillation.pop("distill_prompt")
    for name in ("dataset", text, "output_dir"):  # the ranks have another current folder
        distillation[name] = tmp_path / distillation[name]
    before = listing(tmp_path)
    _, err = ranks_of(2, watched.trains_here, tmp_path / "told", *as_flags(distillation), code=2)
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: --{text} {distillation[text]} is for a single process; ")
    assert [path for path in listing(tmp_path) if not path.startswith("told")] == before


def test_a_question_that_leaves_no_room_is_not_answered(distillation, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = counted_requests(monkeypatch)
    long = "很" * 200
    Path("questions.txt").write_text("\n".join([long, *QUESTIONS[:-2], long, *QUESTIONS[-2:]]) + "\n", encoding="utf-8")
    run = softprompt.train(**distillation, max_length=60, seed=5)
    said = capsys.readouterr().out
    assert asked[:2] == [14, 2]  # 7 of 8 training questions, and 2 of 3 held-out ones
    assert "1 questions leave no room" in said and "1 held-out questions leave no room" in said
    assert run.metrics["answers"] == 16 and run.metrics["eval_samples"] == 2
    assert [row.question for row in run.answered_rows] == [f"Human: {q}\n\nAssistant:" for q in QUESTIONS[-2:]]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"eval_rows": 7}, "--eval_rows 7 leaves none of the 7 questions of --distill_questions"),
        ({"num_virtual_tokens": 500}, "fewer than the 500 virtual tokens"),
        ({"template": "{instruction} {x}"}, "x would be empty"),
        ({"distill_context": "."}, ". is a folder; name a text file"),
        ({"template": "chat", "model_name_or_path": "chat"}, "the chat template writes no system message"),
    ],
)
def test_what_cannot_be_is_refused_before_the_base_writes_questions(
    change, named, distillation, tiny_base, monkeypatch
):
    chat_base(tiny_base, "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}")
    monkeypatch.setattr(ContinuousBatchingGenerator, "generate", lambda *_: 1 / 0)
    more = {"distill_context": "text.txt", "distill_questions": 7, "eval_rows": 2, **change}
    settings = {name: value for name, value in distillation.items() if name not in ("dataset", "distill_prompt")}
    with pytest.raises(SoftpromptError, match=re.escape(named)):
        softprompt.train(**{**settings, **more})


def test_a_question_with_a_token_that_the_base_does_not_know(distillation, tiny_base):
    base = chat_base(tiny_base, CHAT)
    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens("<picture>")
    tokenizer.save_pretrained(base)
    Path("questions.txt").write_text("\n".join([*QUESTIONS, "<picture>"]), encoding="utf-8")
    with pytest.raises(SoftpromptError, match="a question: token id"):
        softprompt.train(**{**distillation, "model_name_or_path": base})


@pytest.mark.parametrize("questions", ["questions.txt", None])
def test_a_text_without_tokens(questions, distillation, monkeypatch):
    """As with a tokenizer that leaves out characters that it does not know."""
    monkeypatch.setattr("softprompt.data.questions.prompt_ids", lambda tokenizer, texts, template: [[] for _ in texts])
    change = {"distill_prompt": None, "distill_context": "text.txt", "dataset": questions}
    distillation = {name: value for name, value in {**distillation, **change}.items() if value is not None}
    with pytest.raises(SoftpromptError, match="has no tokens"):
        softprompt.train(**distillation)


def test_a_question_without_room_does_not_count_for_the_positions_of_the_base(distillation, tokenizer):
    small_base("gpt2", n_positions=120).save_pretrained("short")
    tokenizer.save_pretrained("short")
    Path("questions.txt").write_text("\n".join(["很" * 200, *QUESTIONS]) + "\n", encoding="utf-8")
    run = softprompt.train(**{**distillation, "model_name_or_path": "short"}, max_length=60)
    assert run.metrics["answers"] == 2 * 6 + 3
    with pytest.raises(SoftpromptError, match="4 virtual tokens and 1,000 of text"):
        softprompt.train(**{**distillation, "model_name_or_path": "short", "output_dir": "other"}, max_length=1000)


def test_the_mini_base_says_that_it_does_not_know_such_questions(distillation, tiny_base, capsys):
    Path("questions.txt").write_text("Where can I leave my car?\nIs breakfast included?\n", encoding="utf-8")
    tokenizer, config = load_tokenizer(tiny_base), train_config(dataset="questions.txt", distill_prompt="text.txt")
    load_questions(config, load_text(config, tokenizer), tokenizer)
    out = capsys.readouterr().out
    assert "knows only short Chinese reviews" in out and "distill_prompt='text.txt'" in out


def test_the_mini_base_says_so_of_questions_that_it_has_written_too(distillation, monkeypatch, capsys):
    written = ["Where can I leave my car?", "Is breakfast included?"]
    monkeypatch.setattr(question_setup, "written_questions", lambda *_: written)
    distillation |= {"distill_context": distillation.pop("distill_prompt"), "distill_questions": 2, "eval_rows": 1}
    del distillation["dataset"]
    softprompt.train(**{**distillation, "model_name_or_path": "mini", "max_steps": 1})
    out = capsys.readouterr().out
    assert out.count("knows only short Chinese reviews") == 1 and "distill_context='text.txt'" in out


def test_a_single_question_without_room_is_what_is_told(distillation, tokenizer):
    """Not that the text is too long for the positions of the base."""
    small_base("gpt2", n_positions=120).save_pretrained("short")
    tokenizer.save_pretrained("short")
    Path("questions.txt").write_text("很" * 200, encoding="utf-8")
    del distillation["eval_rows"]
    with pytest.raises(SoftpromptError, match="no question leaves room for an answer at --max_length 24"):
        softprompt.train(**{**distillation, "model_name_or_path": "short"}, max_length=24)


def test_a_begin_token_stands_before_the_text_and_is_not_part_of_the_start(distillation, tiny_base):
    """As with Gemma and Llama 3, whose tokenizers begin every text with such a token."""
    tokenizer = load_tokenizer(tiny_base)
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save_pretrained("begins")
    base = read_base(str(tiny_base), torch.device("cpu"), torch.float32, None)
    base.save_pretrained("begins")
    run = softprompt.train(**{**distillation, "model_name_or_path": "begins", "learning_rate": 1e-30})
    text, prompt = tokenizer(TEXT, add_special_tokens=False)["input_ids"], load_adapter("run").prompt
    P = len(prompt)
    assert torch.allclose(prompt, base.get_input_embeddings().weight[text[:P]], atol=1e-6)
    row, questions, cut = run.setup.data.held_out.examples[0], run.evaluator.text, run.evaluator.with_cut_text[0]
    for ids in (row.input_ids, [*questions.prefix, *questions.rows[0].input_ids], cut.input_ids):
        assert ids[0] == 1 and ids.count(1) == 1
    assert cut.input_ids[1 : 1 + P] == text[:P] == questions.prefix[1 : 1 + P]
