"""The best prompt and early stopping: decisions equal those of transformers; resumed runs decide the same."""

import json
import math
import shutil
from pathlib import Path

import pytest
from helpers.short_runs import interrupted, outcome
from hypothesis import given
from hypothesis import strategies as st
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState

import softprompt
from softprompt.config.loader import train_config
from softprompt.config.train_args import TrainingArguments
from softprompt.data.tokenization import count_targets
from softprompt.evaluation.evaluator import Evaluation, Evaluator
from softprompt.runs.checkpoints import checkpoints, fault_of
from softprompt.training.early_stopping import BestMetric, greater_is_better, metric_name, out_of_patience, update_best
from softprompt.utils.errors import ConfigError


def theirs(values, args, greater: bool) -> list[tuple]:
    """Trainer's best and its callback's patience after each evaluation; the order of calls is Trainer's."""
    callback = EarlyStoppingCallback(args.early_stopping_patience, args.early_stopping_threshold)
    state, control = TrainerState(), TrainerControl()

    class Args:
        metric_for_best_model, greater_is_better = "eval_loss", greater

    seen = []
    for step, value in enumerate(values, start=1):
        callback.on_evaluate(Args, state, control, {"eval_loss": value})
        if state.best_metric is None or (value > state.best_metric if greater else value < state.best_metric):
            state.best_metric, state.best_global_step = value, step
        seen.append((state.best_global_step, state.best_metric, control.should_training_stop))
    return seen


@given(
    values=st.lists(st.sampled_from([0.5, 0.75, 1.0, 1.25, 1.5, 2.0]), min_size=1, max_size=12),
    patience=st.integers(1, 4),
    threshold=st.sampled_from([0.0, 0.25, 0.3, 1.0]),
    greater=st.booleans(),
)
def test_decisions_equal_transformers(values, patience, threshold, greater):
    args = TrainingArguments(
        early_stopping_patience=patience, early_stopping_threshold=threshold, greater_is_better=greater
    )
    best, mine, over = BestMetric(), [], False
    for step, value in enumerate(values, start=1):
        best = update_best(best, step, {"eval_loss": value}, args)
        over = over or out_of_patience(best, args)
        mine.append((best.step, best.metric, over))
    assert mine == theirs(values, args, greater)


def test_metric_names_and_directions():
    assert metric_name(TrainingArguments()) == "eval_loss"
    better = {"loss": False, "eval_perplexity": False, "exact_match": True, "accuracy": True, "eval_macro_f1": True}
    for name, greater in better.items():
        args = TrainingArguments(metric_for_best_model=name)
        assert metric_name(args) == "eval_" + name.removeprefix("eval_") and greater_is_better(args) == greater
    assert greater_is_better(TrainingArguments(greater_is_better=True))


def test_non_finite_metric_is_no_improvement():
    args = TrainingArguments(early_stopping_patience=2)
    best = update_best(BestMetric(), 1, {"eval_loss": math.nan}, args)
    assert best == BestMetric(None, None, 1)
    assert update_best(best, 2, {"eval_loss": 3.0}, args) == BestMetric(2, 3.0, 0)
    assert out_of_patience(update_best(best, 2, {}, args), args)


WRONG = {
    "--load_best_model_at_end needs evaluations": {"load_best_model_at_end": True},
    "--early_stopping_patience needs evaluations": {"early_stopping_patience": 2},
    "--early_stopping_patience 0 must be above 0": {"early_stopping_patience": 0, "eval_steps": 1},
    "--early_stopping_threshold is only used with": {"early_stopping_threshold": 0.1},
    "--early_stopping_threshold -1.0 must not be negative": {"early_stopping_threshold": -1.0},
    "--metric_for_best_model 'bleu' is not one of loss": {"metric_for_best_model": "bleu"},
}


@pytest.mark.parametrize("message", WRONG)
def test_contradictory_settings_are_refused(message):
    with pytest.raises(ConfigError, match=message):
        train_config(**WRONG[message])


@pytest.fixture
def losses(monkeypatch):
    """A list of losses that replaces evaluation: each new prompt gets the next one, a prompt seen before its own again,
    and the bare base 9."""
    script: list[float] = []
    seen: dict[bytes, float] = {}

    def evaluate(self, prompt):
        loss = 9.0
        if prompt is not None:
            loss = seen.setdefault(prompt.numpy().tobytes(), script[min(len(seen), len(script) - 1)])
        targets = list(map(count_targets, self.examples))
        return Evaluation([loss * count for count in targets], targets)

    monkeypatch.setattr(Evaluator, "__call__", evaluate)
    return script


def prompt_of(folder: str) -> bytes:
    return Path(folder, "adapter_model.safetensors").read_bytes()


def test_best_prompt_is_kept_and_becomes_the_result(run_settings, losses, capsys):
    losses += [3.0, 2.0, 2.5, 2.5, 2.5, 2.5]
    run_settings |= {"eval_steps": 3, "save_steps": 2, "save_total_limit": 1, "load_best_model_at_end": True}
    run = softprompt.train(**run_settings)
    assert [p.name for p in checkpoints(Path("run"))] == ["checkpoint-6", "checkpoint-13"]
    assert prompt_of("run") == prompt_of("run/checkpoint-6") != prompt_of("run/checkpoint-13")
    for name in ("optimizer.safetensors", "trainer_state.json", "rng_state.safetensors"):
        assert Path("run", name).read_bytes() == Path("run/checkpoint-6", name).read_bytes()
    assert run.metrics["best_global_step"] == 6 and run.metrics["best_metric"] == run.metrics["eval_loss"] == 2.0
    assert "the best prompt is that of step 6" in capsys.readouterr().err
    expected = outcome()
    softprompt.train(resume_from_checkpoint="run")  # once more from its end
    assert outcome() == expected


def test_last_prompt_is_the_best(run_settings, losses):
    losses += [3.0, 2.0, 1.0]  # after steps 5, 10 and, once training has ended, 13
    run = softprompt.train(**run_settings, load_best_model_at_end=True, save_total_limit=1)
    assert run.metrics["best_global_step"] == 13 and run.metrics["best_metric"] == run.metrics["eval_loss"] == 1.0
    assert prompt_of("run") == prompt_of("run/checkpoint-13") != prompt_of("run/checkpoint-10")


def test_damaged_best_checkpoint_is_reported_and_the_last_prompt_kept(run_settings, losses, capsys):
    losses += [2.0, 3.0]
    run_settings |= {"load_best_model_at_end": True, "output_dir": "run"}
    interrupted(run_settings, 9)
    Path("run/checkpoint-5/optimizer.safetensors").write_bytes(b"")
    softprompt.train(resume_from_checkpoint="run")
    told = capsys.readouterr().err
    assert "warning: the best prompt, of step 5" in told and "optimizer.safetensors is not as it was written" in told
    assert prompt_of("run") == prompt_of("run/checkpoint-13")


STOPS = {"early_stopping_patience": 2, "load_best_model_at_end": True, "save_total_limit": 2, "eval_steps": 2}


def test_early_stopping_is_the_same_in_a_resumed_run(run_settings, losses, capsys):
    losses += [3.0, 2.0, 2.5, 2.25, 1.0]
    run_settings |= {**STOPS, "save_steps": 3}
    softprompt.train(**run_settings)
    expected = outcome()
    assert [r["step"] for r in expected[1] if "eval_loss" in r] == [2, 4, 6, 8]
    assert [p.name for p in checkpoints(Path("run"))] == ["checkpoint-4", "checkpoint-8"]
    assert expected[0] == prompt_of("run/checkpoint-4")
    told = capsys.readouterr().err
    assert "2 evaluations without improvement; training stops; the best was at step 4" in told
    for at in (1, 2, 3, 4, 5, 7, 8):  # before and on each decision
        shutil.rmtree("run")
        interrupted(run_settings, at)
        softprompt.train(**run_settings, resume_from_checkpoint="newest")
        assert outcome() == expected, at
    capsys.readouterr()
    softprompt.train(**run_settings, resume_from_checkpoint="newest")
    assert "after step 8 of 13; early stopping had ended the run there" in capsys.readouterr().out
    assert outcome() == expected
    assert all(fault_of(p) is None for p in checkpoints(Path("run")))
    softprompt.train(resume_from_checkpoint="run", early_stopping_patience=9)  # more patience goes on
    assert [r["step"] for r in outcome()[1] if "eval_loss" in r] == [2, 4, 6, 8, 10, 12, 13]


def test_exact_match_of_long_answers_is_refused(run_settings, tmp_path):
    rows = [{"instruction": "a", "output": "b" * 60}] * 8
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ConfigError, match="answers are compared only where all held-out ones have at most 32 tokens"):
        softprompt.train(**run_settings, load_best_model_at_end=True, metric_for_best_model="exact_match")
    assert not Path("run").exists()


def test_the_best_prompt_by_accuracy(run_settings):
    """The answers of these rows are two labels."""
    chosen = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy", "eval_steps": 2, "max_steps": 6}
    run = softprompt.train(**{**run_settings, **chosen})
    accuracies = {r["step"]: r["eval_accuracy"] for r in outcome()[1] if "eval_accuracy" in r}
    best = max(accuracies, key=accuracies.get)  # the first of several that are equal
    assert list(accuracies) == [2, 4, 6] and run.metrics["best_global_step"] == best
    assert run.metrics["best_metric"] == run.metrics["eval_accuracy"] == accuracies[best]


def test_accuracy_of_answers_that_are_no_labels_is_refused(run_settings, tmp_path):
    rows = [{"instruction": "a", "output": f"b{number}"} for number in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ConfigError, match="--metric_for_best_model macro_f1: the held-out answers are not labels"):
        softprompt.train(**run_settings, load_best_model_at_end=True, metric_for_best_model="macro_f1")
    assert not Path("run").exists()
