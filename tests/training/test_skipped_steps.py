"""fp16 runs whose GradScaler skips steps are saved, stopped, resumed and logged like other runs."""

import functools
import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers.short_runs import interrupted, outcome

import softprompt
from softprompt.config.loader import train_config
from softprompt.engines.microbatch_engine import MicrobatchEngine
from softprompt.runs.checkpoints import checkpoints, fault_of
from softprompt.training.callbacks import RunCallbacks
from softprompt.training.run import Observer, run_training
from softprompt.utils.errors import Stopped


@pytest.fixture
def overflowing(run_settings, monkeypatch):
    """Settings of a run whose initial scale is too large, so that its first steps are skipped."""
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**24))
    return {**run_settings, "fp16": True}


@pytest.fixture
def without_loss(overflowing, monkeypatch):
    """The same, but the skipped steps have no finite loss either."""
    accumulate = MicrobatchEngine.accumulate

    def spoiled(self, prompt, window, grad_scale):
        loss, targets = accumulate(self, prompt, window, grad_scale)
        return (loss if prompt.weight.grad.isfinite().all() else loss * math.nan), targets

    monkeypatch.setattr(MicrobatchEngine, "accumulate", spoiled)
    return overflowing


def record_steps(monkeypatch) -> list[tuple[float | None, float | None]]:
    """A list to which the loss and gradient norm of each further step are appended."""
    seen, on_step = [], RunCallbacks.on_step

    def noted(self, step):
        seen.append((step.loss, step.grad_norm))
        on_step(self, step)

    monkeypatch.setattr(RunCallbacks, "on_step", noted)
    return seen


def assert_all_finite(folder: Path) -> None:
    """Assert that no JSON file below a folder contains NaN or Infinity, which JSON does not have."""

    def refuse(name):
        raise AssertionError(f"{name} in {folder}")

    for path in folder.rglob("*.json*"):
        for text in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("kind", ["overflowing", "without_loss"])
def test_run_killed_after_skipped_steps_resumes_identically(kind, request, monkeypatch):
    run_settings = {**request.getfixturevalue(kind), "save_steps": 1}
    steps = record_steps(monkeypatch)
    softprompt.train(**run_settings)
    overflowed = [number for number, (_, norm) in enumerate(steps, start=1) if norm is None]
    assert 2 <= len(overflowed) < 9, "the test needs skipped steps, and others"
    assert_all_finite(Path("run"))
    expected = outcome()
    finite = [loss for loss, _ in steps if loss is not None]
    assert len(finite) == (13 if kind == "overflowing" else 13 - len(overflowed))
    assert expected[2]["train_loss"] == pytest.approx(sum(finite) / len(finite))
    for at in (2, len(overflowed) + 1):  # checkpoints after 1 step, and after the last skipped one
        shutil.rmtree("run")
        interrupted(run_settings, at)
        state = json.loads(Path(f"run/checkpoint-{at - 1}/trainer_state.json").read_text())
        assert state["scaler"]["scale"] == 2.0 ** (24 - min(at - 1, len(overflowed)))
        softprompt.train(resume_from_checkpoint="run")
        assert outcome() == expected


@pytest.mark.parametrize("kind", ["overflowing", "without_loss"])
def test_signal_during_a_skipped_step_saves(kind, request, monkeypatch):
    run_settings = {**request.getfixturevalue(kind), "save_steps": 100}
    softprompt.train(**run_settings)
    expected, on_step = outcome(), RunCallbacks.on_step
    shutil.rmtree("run")

    def on_second(self, step):
        on_step(self, step)
        if step.number == 2:
            assert step.grad_norm is None
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RunCallbacks, "on_step", on_second)
    with pytest.raises(Stopped) as stopped:
        softprompt.train(**run_settings)
    monkeypatch.setattr(RunCallbacks, "on_step", on_step)
    assert stopped.value.exit_code == 130
    (checkpoint,) = checkpoints(Path("run"))
    assert checkpoint.name == "checkpoint-2" and fault_of(checkpoint) is None
    assert_all_finite(checkpoint)
    softprompt.train(resume_from_checkpoint="run")
    assert outcome() == expected


def test_max_time_during_a_skipped_step_saves(without_loss):
    class OutOfTime(Observer):
        def begin(self, run, callbacks):
            callbacks.stop.ends = 0.0  # the first step is the last one

    settings = {**without_loss, "save_steps": 100, "logging_steps": 100, "max_time": "90s"}
    with pytest.raises(Stopped) as stopped:
        run_training(train_config(**settings), observer=OutOfTime())
    assert stopped.value.exit_code == 124
    (checkpoint,) = checkpoints(Path("run"))
    assert fault_of(checkpoint) is None and json.loads((checkpoint / "trainer_state.json").read_text())["unlogged"]


def test_best_prompt_is_saved_after_a_skipped_step(without_loss):
    kept = {"eval_steps": 1, "load_best_model_at_end": True, "save_steps": 100, "logging_steps": 5}
    run = softprompt.train(**{**without_loss, **kept})
    assert next(iter(checkpoints(run.output_dir))).name == "checkpoint-1"  # the first is the best so far
    assert_all_finite(run.output_dir)


def test_logged_loss_averages_the_finite_losses(without_loss, monkeypatch):
    steps = record_steps(monkeypatch)
    softprompt.train(**{**without_loss, "logging_steps": 1})
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in records if "loss" in r] == [loss for loss, _ in steps] and steps[0] == (None, None)
    softprompt.train(**{**without_loss, "logging_steps": 13, "overwrite_output_dir": True})
    (mean,) = [r["loss"] for r in map(json.loads, Path("run/metrics.jsonl").read_text().splitlines()) if "loss" in r]
    finite = [loss for loss, _ in steps[:13] if loss is not None]
    assert mean == pytest.approx(sum(finite) / len(finite))


def test_run_may_skip_every_step(without_loss, capsys):
    run = softprompt.train(**{**without_loss, "max_steps": 1})
    assert "train_loss" not in run.metrics and fault_of(Path("run/checkpoint-1")) is None
    assert "1 of 1 steps" in capsys.readouterr().err
    assert_all_finite(Path("run"))


def test_fp32_run_resumes_in_fp16(run_settings):
    interrupted(run_settings, 9)
    softprompt.train(resume_from_checkpoint="run", fp16=True)
    assert [r["step"] for r in outcome()[1]][-1] == 13
