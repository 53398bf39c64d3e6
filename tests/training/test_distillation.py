"""Runs that distill a text: what they learn from, write and show, how they resume, and what they refuse."""

import json
import time
from datetime import date
from pathlib import Path

import pytest
import torch
from helpers.programs import run_infer
from helpers.serving import running_server
from helpers.short_runs import interrupted, outcome
from helpers.small_bases import small_base
from transformers import AutoModelForCausalLM, AutoTokenizer

import softprompt
from softprompt.config.loader import train_config
from softprompt.data.examples import count_targets
from softprompt.data.questions import questions_about, written_questions
from softprompt.data.template import Template, saved_template
from softprompt.engines import choice
from softprompt.evaluation.distillation import DistillationEvaluator
from softprompt.export import export
from softprompt.generation.continuous_batching import ContinuousBatchingGenerator
from softprompt.models.loading import load_tokenizer, read_base
from softprompt.prompt.adapter_io import load_adapter
from softprompt.training import resume
from softprompt.training.dry_run import _predictions_bytes, dry_run
from softprompt.training.question_setup import identity_of
from softprompt.training.run import run_training
from softprompt.training.setup import Base
from softprompt.training.summary import summary
from softprompt.utils.errors import CheckpointError, SoftpromptError, Stopped

QUESTIONS = [f"问题{i}：好吗" for i in range(9)]
TEXT = "请用一句话回答客人的问题，并且总是说谢谢您。"


@pytest.fixture
def settings(tiny_base, tmp_path, monkeypatch):
    """A run of 4 steps over 6 questions with 2 answers each; 3 questions are held out."""
    monkeypatch.chdir(tmp_path)
    Path("questions.txt").write_text("\n".join(QUESTIONS) + "\n", encoding="utf-8")
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    return {
        **{"model_name_or_path": str(tiny_base), "dataset": "questions.txt", "eval_rows": 3, "output_dir": "run"},
        **{"distill_prompt": "text.txt", "distill_samples": 2, "distill_max_new_tokens": 5, "num_virtual_tokens": 4},
        **{"max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "save_steps": 2},
    }


def log_probabilities(base, before, ids, answer):
    """Those at the tokens of `answer` behind the embeddings `before` and the token ids `ids`: [n, V]."""
    words = base.get_input_embeddings()(torch.tensor([*ids, *answer]))
    logits = base(inputs_embeds=torch.cat([before, words])[None]).logits[0]
    return logits[len(before) + len(ids) - 1 : -1].log_softmax(-1)


@torch.no_grad()
def naive_figures(base, tokenizer, rows, prompt):
    """KL and agreement of a prompt [P, H], over rows (ids without the text, ids with it, answer)."""
    total = agree = tokens = 0
    for plain, with_text, answer in rows:
        theirs = log_probabilities(base, prompt[:0], with_text, answer)
        ours = log_probabilities(base, prompt, plain, answer)
        total += (theirs.exp() * (theirs - ours)).sum().item()
        agree += int((theirs.argmax(-1) == ours.argmax(-1)).sum())
        tokens += len(answer)
    return total / tokens, agree / tokens


def test_the_figures_are_those_of_questions_run_alone(settings):
    run = softprompt.train(**settings)
    tokenizer, base = load_tokenizer(settings["model_name_or_path"]), run.setup.base
    text, rows = tokenizer(TEXT + "\n", add_special_tokens=False)["input_ids"], []
    for question, row in zip(QUESTIONS[-3:], run.setup.data.held_out.examples, strict=True):
        plain = tokenizer(f"Human: {question}\n\nAssistant: ", add_special_tokens=False)["input_ids"]
        answer = row.input_ids[len(plain) :]
        # The teacher's answer is the base's greedy one behind the text.
        whole = torch.tensor([[*text, *plain]])
        greedy = base.generate(whole, do_sample=False, max_new_tokens=5, pad_token_id=3)[0, whole.shape[1] :].tolist()
        assert row.input_ids[: len(plain)] == plain and answer == greedy
        rows.append((plain, [*text, *plain], answer))
    prompt = load_adapter("run").prompt
    for suffix, values in (("", prompt), ("_base", prompt[:0])):
        kl, agreement = naive_figures(base, tokenizer, rows, values)
        assert run.metrics[f"eval_kl{suffix}"] == pytest.approx(kl, rel=1e-3, abs=1e-5)
        assert run.metrics[f"eval_agreement{suffix}"] == pytest.approx(agreement)
    cut = [(text[:4] + plain, whole, answer) for plain, whole, answer in rows]
    assert run.metrics["eval_kl_cut"] == pytest.approx(naive_figures(base, tokenizer, cut, prompt[:0])[0], rel=1e-3)
    assert run.metrics["tokens_saved"] == len(text) - 4
    assert run.metrics["eval_kl_low"] < run.metrics["eval_kl"] == run.metrics["eval_loss"]
    assert run.metrics["eval_kl"] < run.metrics["eval_kl_base"] and "eval_perplexity" not in run.metrics


def test_answers_are_sampled_once_and_kept(settings, tmp_path, monkeypatch, capsys):
    """The seed decides the samples. A run with the same settings takes those of the cache, also after an error."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    generate, asked = ContinuousBatchingGenerator.generate, []

    def counting(self, requests, *more):
        asked.append(len(requests))
        return generate(self, requests, *more)

    def stopping(self, requests, *more):
        answers = counting(self, requests, *more)
        return (next(answers) if at < 5 else 1 / 0 for at in range(6))

    monkeypatch.setattr(ContinuousBatchingGenerator, "generate", stopping)
    with pytest.raises(ZeroDivisionError):
        softprompt.train(**settings, max_length=100)
    monkeypatch.setattr(ContinuousBatchingGenerator, "generate", counting)
    first = softprompt.train(**settings, max_length=100)
    assert asked[:2] == [12, 7]  # 5 of 12 were kept
    kept = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("answers/*")}
    again = softprompt.train(**{**settings, "output_dir": "again"}, max_length=100)
    assert kept == {path: path.read_bytes() for path in (tmp_path / "cache").rglob("answers/*")}
    assert len(kept) == 1 and outcome("run")[0] == outcome("again")[0]
    other = softprompt.train(**{**settings, "output_dir": "other", "seed": 7})
    rows = [[row.input_ids for row in run.setup.data.train.examples] for run in (first, again, other)]
    assert rows[0] == rows[1] != rows[2] and len(rows[0]) == 12
    assert "12 answers with the text to 6 questions" in capsys.readouterr().out


@pytest.mark.parametrize("speed", [2.0, 0.5], ids=["packed is faster", "padded is faster"])
@pytest.mark.parametrize("more", [{}, {"prompt_reparameterization": "mlp", "encoder_hidden_size": 4}])
def test_a_resumed_run_equals_one_that_was_never_stopped(settings, more, speed, monkeypatch, tmp_path):
    monkeypatch.setattr(choice, "measure_speed", lambda *args: speed)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = {**settings, **more, "eval_steps": 2}
    softprompt.train(**{**settings, "output_dir": "whole"})
    interrupted(settings, 3)
    softprompt.train(resume_from_checkpoint="run")
    prompt, history, results = outcome("run")
    expected, records, others = outcome("whole")
    times = {"time_to_first_token", "time_to_first_token_text"}
    assert prompt == expected and history == records
    assert {k: v for k, v in results.items() if k not in times} == {k: v for k, v in others.items() if k not in times}
    Path("text.txt").write_text("另一段很长的文字，别的要求，别的语气。", encoding="utf-8")
    monkeypatch.setattr(ContinuousBatchingGenerator, "generate", lambda *_: 1 / 0)  # nothing is answered before
    with pytest.raises(CheckpointError, match="distilled text"):
        softprompt.train(resume_from_checkpoint="run", max_steps=6)


def test_a_run_is_resumed_without_the_cache_and_in_another_dtype(settings, monkeypatch, tmp_path):
    """The answers are those in its folder, although the base would give others now."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = softprompt.train(**settings)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other cache"))
    monkeypatch.setattr(ContinuousBatchingGenerator, "generate", lambda *_: 1 / 0)
    monkeypatch.setattr(DistillationEvaluator, "answered_rows", lambda *_: [])
    monkeypatch.setattr(DistillationEvaluator, "costs", lambda *_: {})
    again = softprompt.train(resume_from_checkpoint="run", max_steps=6, bf16=True, output_dir="elsewhere")
    assert again.setup.data.train.examples == first.setup.data.train.examples
    assert Path("elsewhere/teacher_answers.jsonl").read_bytes() == Path("run/teacher_answers.jsonl").read_bytes()


@pytest.mark.parametrize("was", [True, False])
def test_a_run_does_not_turn_into_a_distillation_or_out_of_one(was, settings):
    plain = {name: value for name, value in settings.items() if not name.startswith("distill")}
    plain |= {"dataset": "rows.jsonl", "prompt_tuning_init": "RANDOM"}
    Path("rows.jsonl").write_text("\n".join(json.dumps({"instruction": q, "output": "好"}) for q in QUESTIONS))
    softprompt.train(**(settings if was else plain))
    change = {"distill_prompt": None, "dataset": "rows.jsonl"} if was else {"distill_prompt": "text.txt"}
    with pytest.raises(CheckpointError, match="--init_adapter"):
        softprompt.train(resume_from_checkpoint="run", max_steps=6, ignore_data_skip=True, **change)


def test_it_is_shown_and_it_is_an_ordinary_adapter(settings, capsys, monkeypatch, tmp_path):
    run = softprompt.train(**{**settings, "distill_prompt": str(tmp_path / "text.txt")})
    monkeypatch.setenv("COLUMNS", "200")
    text = summary(run)
    for shown in ("KL per token", "text cut", "tokens saved per request", "with the text"):
        assert shown in text
    assert "too few" in run.verdict.sentence and "first 4 tokens of the text" in run.verdict.sentence
    assert [row.question for row in run.answered_rows] == [f"Human: {q}\n\nAssistant:" for q in QUESTIONS[-3:]]
    page, card = Path("run/report.html").read_text(), Path("run/README.md").read_text()
    for shown in (f"{run.metrics['eval_kl']:.4f}", f"{run.metrics['eval_kl_cut']:.4f}"):
        assert shown in page and shown in card
    assert "| with the text |" in card and "held-out loss" not in card
    out = run_infer(["--adapter", "run", "--prompt", QUESTIONS[0], "--max_new_tokens", "3"], capsys, monkeypatch)
    assert out.strip()
    saved = json.loads(Path("run/adapter_config.json").read_text())
    assert saved["prompt_tuning_init"] == "TEXT" and TEXT.startswith(saved["prompt_tuning_init_text"])
    assert "distill" not in Path("run/softprompt.json").read_text()
    assert str(tmp_path) not in card


def test_it_is_exported_served_mixed_and_voted_with_like_any_other(settings):
    softprompt.train(**settings)
    softprompt.train(**{**settings, "output_dir": "other", "seed": 7})
    model = softprompt.SoftPromptModel.from_pretrained(None, {"one": "run", "other": "other"})
    how = {"do_sample": False, "max_new_tokens": 4}
    alone = [model.generate(QUESTIONS[0], adapter=name, **how) for name in ("one", "other", "none")]
    assert model.generate([QUESTIONS[0]] * 3, adapter=["one", "other", "none"], **how) == alone
    assert set(model.ensemble().generate(QUESTIONS[:2], **how)) and model.classify(QUESTIONS[0], ["好", "坏"])
    export("run", "plain")
    plain, tokenizer = AutoModelForCausalLM.from_pretrained("plain"), AutoTokenizer.from_pretrained("plain")
    text = tokenizer.apply_chat_template([{"role": "user", "content": QUESTIONS[0]}], tokenize=False)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    answer = plain.generate(ids, do_sample=False, max_new_tokens=4)[0, ids.shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True).strip() == alone[0]
    with running_server(model, "run") as server:
        assert server.ask("run", QUESTIONS[0], temperature=0, max_tokens=4).strip() == alone[0]


@pytest.mark.parametrize("form", ["rows", "columns", "conversations"])
def test_answers_of_rows_are_not_used(form, settings, capsys):
    rows = [{"instruction": q, "output": "不对"} for q in QUESTIONS]
    more = {}
    if form == "columns":
        rows, more = [{"q": q, "a": "不对"} for q in QUESTIONS], {"columns": "instruction=q,output=a"}
    if form == "conversations":
        asked = ({"role": "user", "content": q} for q in QUESTIONS)
        rows = [{"messages": [each, {"role": "assistant", "content": "不对"}]} for each in asked]
        more = {"template": "chat", "model_name_or_path": chat_base(settings["model_name_or_path"], CHAT)}
        settings |= more
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ours = softprompt.train(**{**settings, "dataset": "rows.jsonl", **more})
    plain = softprompt.train(**{**settings, "output_dir": "plain"})
    assert ours.setup.data.train.examples == plain.setup.data.train.examples
    assert outcome("run")[0] == outcome("plain")[0]
    assert capsys.readouterr().out.count("are not used") == 1


def chat_base(folder, template):
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained("chat")
    read_base(str(folder), torch.device("cpu"), torch.float32, None).save_pretrained("chat")
    return "chat"


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def test_the_text_is_the_system_message_of_a_chat(settings, tiny_base):
    base = chat_base(tiny_base, CHAT)
    asked = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "x"}]} for q in QUESTIONS]
    own = [{"role": "system", "content": "短"}, {"role": "user", "content": "嗯"}]
    Path("chats.jsonl").write_text("\n".join(map(json.dumps, [{"messages": own}, *asked])))
    run = softprompt.train(**{**settings, "dataset": "chats.jsonl", "model_name_or_path": base, "template": "chat"})
    tokenizer = load_tokenizer(base)
    row, questions = run.setup.data.held_out.examples[-1], run.evaluator.text
    assert tokenizer.decode(row.input_ids).startswith(f"<user>{QUESTIONS[-1]}</s><a>")
    assert tokenizer.decode(questions.prefix).startswith(f"<system>{TEXT}")
    cut = tokenizer.decode(run.evaluator.with_cut_text[-1].input_ids)
    assert cut.startswith("<system>请") and f"</s><user>{QUESTIONS[-1]}</s><a>" in cut and TEXT not in cut


class Calendar(date):
    """A date whose today() the test sets."""

    now = date(2001, 2, 3)

    @classmethod
    def today(cls):
        return cls.now


@pytest.mark.parametrize("more", [{}, {"chat_template_date": "1999-12-31"}], ids=["today", "given"])
@pytest.mark.parametrize("distills", [True, False])
def test_a_chat_template_that_writes_the_date_sees_the_day_on_which_the_run_started(
    distills, more, settings, tiny_base, monkeypatch
):
    """The run is resumed two days later, without a cache."""
    date_twice = """{{ strftime_now('%Y-%m-%d') }} {{ strftime_now (format = "%d") }}"""
    base = chat_base(tiny_base, date_twice + CHAT.replace("<a>", "<assistant>"))
    settings = {**settings, "model_name_or_path": base, "template": "chat", "max_length": 100, **more}
    if not distills:
        settings = {name: value for name, value in settings.items() if not name.startswith("distill")}
        rows = [{"instruction": question, "output": "好"} for question in QUESTIONS]
        Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        settings["dataset"] = "rows.jsonl"
    monkeypatch.setattr(resume, "date", Calendar)
    first = softprompt.train(**settings)
    monkeypatch.setattr(Calendar, "now", date(2001, 2, 5))
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path("other cache").absolute()))
    again = softprompt.train(resume_from_checkpoint="run", max_steps=6)
    tokenizer, day = load_tokenizer(base), more.get("chat_template_date", "2001-02-03")
    for run in (first, again):
        assert tokenizer.decode(run.setup.data.train.examples[0].input_ids).startswith(f"{day} {day[-2:]}<user>")
    assert again.setup.data.train.examples == first.setup.data.train.examples
    settings_of_questions = json.loads(Path("run/softprompt.json").read_text())
    assert saved_template(settings_of_questions).date is None  # new questions are asked with the day's own date
    assert "chat_template_date" not in Path("run/README.md").read_text()


def test_a_distillation_that_runs_out_of_time_continues_with_the_answers_that_it_has(settings, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    generate, asked = ContinuousBatchingGenerator.generate, []

    def counting(self, requests, *more):
        asked.append(len(requests))
        return generate(self, requests, *more)

    monkeypatch.setattr(ContinuousBatchingGenerator, "generate", counting)
    with pytest.raises(Stopped, match="11 answers") as stopped:
        run_training(train_config(**settings, max_time="10s"), began=time.monotonic() - 60)
    assert stopped.value.exit_code == 124 and not Path("run").exists()
    softprompt.train(**settings)
    assert asked[:2] == [12, 11]  # the first command generated one answer


def test_dry_run_and_search_of_a_learning_rate(settings, tmp_path):
    told = dry_run(train_config(**settings, dry_run=True))
    assert not Path("run").exists()
    for part in ("12 with", "are kept for the run", "the predictions with the text"):
        assert part in told
    many = "\n".join(f"{q}{i}" for q in QUESTIONS for i in range(5))
    Path("questions.txt").write_text(many, encoding="utf-8")
    run = softprompt.train(**settings, find_learning_rate=True)
    assert "sweep" in run.history[0]
    targets = sum(map(count_targets, [*run.setup.data.train.examples, *run.setup.data.held_out.examples]))
    H = run.setup.prompt.weight.shape[1]
    assert _predictions_bytes(run.setup) == targets * (4 * H + 4 + 8)  # a vector, an entropy and a token id


def test_a_base_whose_head_is_not_plain(settings, tokenizer, capsys):
    small_base("gemma2", max_position_embeddings=60).save_pretrained("gemma2")
    tokenizer.save_pretrained("gemma2")
    run = softprompt.train(**{**settings, "model_name_or_path": "gemma2"})
    assert run.metrics["eval_kl"] < run.metrics["eval_kl_base"]
    assert "more than the 60 positions that the base was trained on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"distill_prompt": "none.txt"}, "none.txt: no such file"),
        ({"distill_prompt": "empty.txt"}, "empty.txt is empty"),
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
        ({"truncation_side": "input"}, "--truncation_side input"),
        ({"template": "chat"}, "no chat template"),
        ({"prompt_tuning_init": "CLASS_LABELS"}, "--class_labels"),
        ({"model_name_or_path": "short"}, "shorten the text"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(change, named, settings, tokenizer):
    Path("empty.txt").write_text(" \n")
    Path("some.jsonl").write_text("\n".join(json.dumps({"instruction": each}) for each in ("a", "", "b", "c", "d")))
    if change.get("model_name_or_path") == "short":
        small_base("gpt2", n_positions=16).save_pretrained("short")
        tokenizer.save_pretrained("short")
    settings = {name: value for name, value in {**settings, **change}.items() if value is not None}
    with pytest.raises(SoftpromptError, match=named) as refused:
        softprompt.train(**settings)
    assert "\n" not in str(refused.value) and not Path("run").exists()


def test_a_quantized_base_has_answers_of_its_own(settings):
    base, each = Base(None, None, {"base": "a hash"}), [{}, {"load_in_8bit": True}, {"load_in_4bit": True}]
    assert len({str(identity_of(train_config(**settings, **more), base, "a hash")) for more in each}) == 3


def test_a_question_with_a_token_that_the_base_does_not_know(settings, tiny_base):
    base = chat_base(tiny_base, CHAT)
    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens("<picture>")
    tokenizer.save_pretrained(base)
    Path("questions.txt").write_text("\n".join([*QUESTIONS, "<picture>"]), encoding="utf-8")
    with pytest.raises(SoftpromptError, match="a question: token id"):
        softprompt.train(**{**settings, "model_name_or_path": base})


def test_another_prompt_to_start_from(settings):
    """It decides the number of virtual tokens, and so how far the text is cut."""
    first = softprompt.train(**settings)
    del settings["num_virtual_tokens"]
    second = softprompt.train(**{**settings, "init_adapter": "run", "output_dir": "second"})
    assert len(second.setup.prompt.weight) == 4
    assert second.metrics["eval_kl_cut"] == first.metrics["eval_kl_cut"] > 1e-3
    Path("text.txt").write_text("a")
    with pytest.raises(SoftpromptError, match="fewer than the 4 virtual tokens"):
        softprompt.train(**{**settings, "init_adapter": "run", "output_dir": "third"})


def test_a_resumed_run_may_get_held_out_questions(settings):
    """The questions that were trained on, and their answers, are the same."""
    first = softprompt.train(**{**settings, "eval_rows": 0})
    Path("others.txt").write_text("问别的\n再问别的\n", encoding="utf-8")
    run = softprompt.train(resume_from_checkpoint="run", max_steps=6, eval_dataset="others.txt")
    assert run.metrics["eval_samples"] == 2 and run.setup.data.train.examples == first.setup.data.train.examples
    with pytest.raises(CheckpointError, match="held-out rows"):
        softprompt.train(resume_from_checkpoint="run", max_steps=8, eval_dataset="questions.txt")


def test_metrics_of_distillation_need_it(settings):
    plain = {name: value for name, value in settings.items() if not name.startswith("distill")}
    with pytest.raises(SoftpromptError, match="only computed with --distill_prompt"):
        softprompt.train(**plain, metric_for_best_model="kl")


def test_answers_that_do_not_end_are_counted(settings, capsys):
    run = softprompt.train(**{**settings, "distill_max_new_tokens": 1})
    said = capsys.readouterr().out
    assert "do not end within --distill_max_new_tokens 1" in said
    assert run.metrics["answers"] == 15 and 0 < run.metrics["answers_not_ended"] <= 15


def test_the_report_says_what_is_compared_without_held_out_questions(settings):
    softprompt.train(**{**settings, "eval_rows": 0})
    page = Path("run/report.html").read_text()
    assert "with the text" in page and "that replace the text of text.txt" in page


def test_the_base_writes_the_questions_about_a_document(settings, capsys):
    """The questions are kept as the answers are, and a resumed run has the same ones."""
    del settings["dataset"], settings["distill_prompt"]
    document = "这是一份很长的文件，讲酒店的房间、早餐和停车。" * 12
    Path("text.txt").write_text(document, encoding="utf-8")
    more = {"distill_context": "text.txt", "distill_questions": 7, "eval_rows": 2, "num_virtual_tokens": 3}
    run = softprompt.train(**{**settings, **more, "output_dir": "whole"})
    asked = [row["instruction"] for row in run.setup.data.first_rows]
    assert len(asked) == 5 == len(set(asked)) and run.setup.data.held_out.rows == 2
    assert "the base wrote 7 of the 7 requested questions" in capsys.readouterr().out
    assert "that replace the text of text.txt" in Path("whole/report.html").read_text()
    interrupted({**settings, **more}, 3)
    softprompt.train(resume_from_checkpoint="run")
    assert outcome("run")[0] == outcome("whole")[0]
    assert "so that the base answers as with a long text" in Path("run/README.md").read_text()


@pytest.mark.parametrize(
    ("answers", "questions"),
    [
        (
            ["What is it?\nAnd more", '"What is it?"', "  \n", "Question: Where?", "“在哪里？”"],
            ["What is it?", "Where?", "在哪里？"],
        ),
        ([], []),
    ],
)
def test_a_question_is_the_first_line_of_an_answer(answers, questions, tokenizer):
    ids = [tokenizer(answer)["input_ids"] for answer in answers]
    assert written_questions(ids, tokenizer) == questions


def test_passages_are_taken_from_the_whole_text(tokenizer):
    words = [f"第{number}段" for number in range(600)]
    template = Template("{instruction}")
    every = questions_about("。".join(words), tokenizer, template, 1000)
    some = questions_about("。".join(words), tokenizer, template, 3)
    assert len(every) > 6 and len(some) == 3 and some[0] == every[0]
    assert every.index(some[1]) == len(every) // 3 and every.index(some[2]) == 2 * len(every) // 3


@pytest.mark.parametrize("questions", ["questions.txt", None])
def test_a_text_without_tokens(questions, settings, monkeypatch):
    """As with a tokenizer that leaves out characters that it does not know."""
    monkeypatch.setattr("softprompt.data.questions.prompt_ids", lambda tokenizer, texts, template: [[] for _ in texts])
    change = {"distill_prompt": None, "distill_context": "text.txt", "dataset": questions}
    settings = {name: value for name, value in {**settings, **change}.items() if value is not None}
    with pytest.raises(SoftpromptError, match="has no tokens"):
        softprompt.train(**settings)


@pytest.mark.slow
def test_the_preset_distills_a_request(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = softprompt.train("distill-mini")
    assert run.metrics["eval_kl"] < run.metrics["eval_kl_cut"] < run.metrics["eval_kl_base"]
    assert run.verdict.better and run.metrics["tokens_saved"] == 48
