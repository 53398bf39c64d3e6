"""Distillations that are resumed, and the answers that they keep."""

import json
import time
from datetime import date
from pathlib import Path

import pytest
from helpers.bases import make_bloom
from helpers.distillation import CHAT, QUESTIONS, chat_base, counted_requests
from helpers.short_runs import interrupted, outcome

import softprompt
from softprompt.config.loader import train_config
from softprompt.data.template import saved_template
from softprompt.engines import choice
from softprompt.evaluation.distillation import DistillationEvaluator
from softprompt.generation.continuous_batching import ContinuousBatchingGenerator
from softprompt.models.loading import load_tokenizer
from softprompt.training import resume
from softprompt.training.run import run_training
from softprompt.utils.errors import CheckpointError, Stopped


def test_answers_are_sampled_once_and_kept(distillation, tmp_path, monkeypatch, capsys):
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
        softprompt.train(**distillation, max_length=100)
    monkeypatch.setattr(ContinuousBatchingGenerator, "generate", counting)
    first = softprompt.train(**distillation, max_length=100)
    assert asked[:2] == [12, 7]  # 5 of 12 were kept
    kept = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("answers/*")}
    again = softprompt.train(**{**distillation, "output_dir": "again"}, max_length=100)
    assert kept == {path: path.read_bytes() for path in (tmp_path / "cache").rglob("answers/*")}
    assert len(kept) == 1 and outcome("run")[0] == outcome("again")[0]
    other = softprompt.train(**{**distillation, "output_dir": "other", "seed": 7})
    rows = [[row.input_ids for row in run.setup.data.train.examples] for run in (first, again, other)]
    assert rows[0] == rows[1] != rows[2] and len(rows[0]) == 12
    assert "12 answers with the text to 6 questions" in capsys.readouterr().out


@pytest.mark.parametrize("speed", [2.0, 0.5], ids=["packed is faster", "padded is faster"])
@pytest.mark.parametrize("more", [{}, {"prompt_reparameterization": "mlp", "encoder_hidden_size": 4}])
def test_a_resumed_run_equals_one_that_was_never_stopped(distillation, more, speed, monkeypatch, tmp_path):
    monkeypatch.setattr(choice, "measure_speed", lambda *args: speed)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    distillation = {**distillation, **more, "eval_steps": 2}
    softprompt.train(**{**distillation, "output_dir": "whole"})
    interrupted(distillation, 3)
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


def test_a_run_is_resumed_without_the_cache_and_in_another_dtype(distillation, monkeypatch, tmp_path):
    """The answers are those in its folder, although the base would give others now."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = softprompt.train(**distillation)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other cache"))
    monkeypatch.setattr(ContinuousBatchingGenerator, "generate", lambda *_: 1 / 0)
    monkeypatch.setattr(DistillationEvaluator, "answered_rows", lambda *_: [])
    monkeypatch.setattr(DistillationEvaluator, "costs", lambda *_: {})
    again = softprompt.train(resume_from_checkpoint="run", max_steps=6, bf16=True, output_dir="elsewhere")
    assert again.setup.data.train.examples == first.setup.data.train.examples
    assert Path("elsewhere/teacher_answers.jsonl").read_bytes() == Path("run/teacher_answers.jsonl").read_bytes()


def test_a_run_whose_answers_have_changed_is_resumed_with_those_of_the_cache(distillation, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = softprompt.train(**distillation)
    kept = Path("run/teacher_answers.jsonl")
    kept.write_bytes(kept.read_bytes().replace(b", [", b", [7, ", 1))
    again = softprompt.train(resume_from_checkpoint="run", max_steps=6)
    assert again.setup.data.train.examples == first.setup.data.train.examples
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other cache"))
    kept.unlink()
    others = lambda self, asked, *_: ((number, [7]) for number in range(len(asked)))  # noqa: E731
    monkeypatch.setattr(ContinuousBatchingGenerator, "generate", others)
    with pytest.raises(CheckpointError, match="restore run/teacher_answers"):
        softprompt.train(resume_from_checkpoint="run", max_steps=8)


@pytest.mark.parametrize("was", [True, False])
def test_a_run_does_not_turn_into_a_distillation_or_out_of_one(was, distillation):
    plain = {name: value for name, value in distillation.items() if not name.startswith("distill")}
    plain |= {"dataset": "rows.jsonl", "prompt_tuning_init": "RANDOM"}
    Path("rows.jsonl").write_text("\n".join(json.dumps({"instruction": q, "output": "好"}) for q in QUESTIONS))
    softprompt.train(**(distillation if was else plain))
    change = {"distill_prompt": None, "dataset": "rows.jsonl"} if was else {"distill_prompt": "text.txt"}
    with pytest.raises(CheckpointError, match="--init_adapter"):
        softprompt.train(resume_from_checkpoint="run", max_steps=6, ignore_data_skip=True, **change)


def test_a_resumed_run_may_get_held_out_questions(distillation):
    """The questions that were trained on, and their answers, are the same."""
    first = softprompt.train(**{**distillation, "eval_rows": 0})
    Path("others.txt").write_text("问别的\n再问别的\n", encoding="utf-8")
    run = softprompt.train(resume_from_checkpoint="run", max_steps=6, eval_dataset="others.txt")
    assert run.metrics["eval_samples"] == 2 and run.setup.data.train.examples == first.setup.data.train.examples
    with pytest.raises(CheckpointError, match="held-out rows"):
        softprompt.train(resume_from_checkpoint="run", max_steps=8, eval_dataset="questions.txt")


def test_other_contents_are_named(distillation, capsys):
    softprompt.train(**distillation)
    Path("text.txt").write_text("另一段很长的文字，别的要求，别的语气。", encoding="utf-8")
    capsys.readouterr()
    softprompt.train(resume_from_checkpoint="run", max_steps=6, ignore_data_skip=True)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "ignore_data_skip" in line]
    assert set(line.split(": ")[-1].split(", ")) == {"distilled text", "answers with the text", "held-out rows"}


def test_another_base_answers_itself(distillation, tokenizer):
    """The run's folder has the answers of the first base."""
    first = softprompt.train(**distillation)
    make_bloom(seed=3).save_pretrained("another")
    tokenizer.save_pretrained("another")
    again = {"model_name_or_path": "another", "ignore_data_skip": True, "max_steps": 6, "output_dir": "again"}
    resumed = softprompt.train(resume_from_checkpoint="run", **again)
    new = softprompt.train(**{**distillation, "model_name_or_path": "another", "output_dir": "new"})
    assert resumed.setup.data.train.examples == new.setup.data.train.examples != first.setup.data.train.examples


class Calendar(date):
    """A date whose today() the test sets."""

    now = date(2001, 2, 3)

    @classmethod
    def today(cls):
        return cls.now


@pytest.mark.parametrize("more", [{}, {"chat_template_date": "1999-12-31"}], ids=["today", "given"])
@pytest.mark.parametrize("distills", [True, False])
def test_a_chat_template_that_writes_the_date_sees_the_day_on_which_the_run_started(
    distills, more, distillation, tiny_base, monkeypatch
):
    """The run is resumed two days later, without a cache."""
    date_twice = """{{ strftime_now('%Y-%m-%d') }} {{ strftime_now (format = "%d") }}"""
    base = chat_base(tiny_base, date_twice + CHAT.replace("<a>", "<assistant>"))
    distillation = {**distillation, "model_name_or_path": base, "template": "chat", "max_length": 100, **more}
    if not distills:
        distillation = {name: value for name, value in distillation.items() if not name.startswith("distill")}
        rows = [{"instruction": question, "output": "好"} for question in QUESTIONS]
        Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        distillation["dataset"] = "rows.jsonl"
    monkeypatch.setattr(resume, "date", Calendar)
    first = softprompt.train(**distillation)
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


def test_a_distillation_that_runs_out_of_time_continues_with_the_answers_that_it_has(
    distillation, monkeypatch, tmp_path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = counted_requests(monkeypatch)
    with pytest.raises(Stopped, match="11 answers") as stopped:
        run_training(train_config(**distillation, max_time="10s"), began=time.monotonic() - 60)
    assert stopped.value.exit_code == 124 and not Path("run").exists()
    softprompt.train(**distillation)
    assert asked[:2] == [12, 11]  # the first command generated one answer


def test_a_distillation_that_runs_out_of_time_during_the_predictions_keeps_its_answers(
    distillation, monkeypatch, tmp_path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = {**distillation, "distill_samples": 40}  # more than one micro-batch of rows
    softprompt.train(**{**settings, "output_dir": "whole"})
    monkeypatch.setattr(ContinuousBatchingGenerator, "generate", lambda *_: 1 / 0)
    with pytest.raises(Stopped, match="predictions") as stopped:
        run_training(train_config(**settings, max_time="10s"), began=time.monotonic() - 60)
    assert stopped.value.exit_code == 124 and not Path("run").exists()
