"""softprompt.train: its settings in the signature and the docstring, unknown settings, and interrupts."""

import inspect
import os
import signal
import sys
from dataclasses import fields

import pytest
import torch

import softprompt
from softprompt.config.loader import GROUPS, PRESETS
from softprompt.prompt.adapter_io import load_adapter
from softprompt.training.callbacks import RunCallbacks
from softprompt.utils.errors import ConfigError, Stopped

FIELDS = {field.name: field.default for group in GROUPS for field in fields(group)}


def test_signature_and_docstring_show_every_setting():
    parameters = dict(inspect.signature(softprompt.train).parameters)
    assert parameters.pop("preset").default is None
    assert {name: p.default for name, p in parameters.items()} == FIELDS
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters.values())
    described = inspect.getdoc(softprompt.train).partition("Settings:")[2]
    for name, default in FIELDS.items():
        (line,) = [line for line in described.splitlines() if line.startswith(f"    {name}: ")]
        assert f"= {default!r}" in line
        for preset, values in PRESETS.items():
            assert name not in values or f"{values[name]!r} with preset {preset}" in line
    assert "`bf16=False` computes in fp32" in described
    assert "--" not in described.replace("--tensorboard", "").replace("--logdir", "")


WRONG = {
    "learning_rte": "unknown setting 'learning_rte'; did you mean learning_rate?",
    "lr": "unknown setting 'lr'; did you mean learning_rate?",
    "epochs": "unknown setting 'epochs'; did you mean num_train_epochs?",
    "datset": "unknown setting 'datset'; did you mean dataset?",
}


@pytest.mark.parametrize("name", WRONG)
def test_an_unknown_setting_names_the_nearest_and_blames_no_other(name):
    for base in ({}, {"model_name_or_path": "some/base"}):  # without a dataset, which is not what is wrong
        with pytest.raises(ConfigError) as refusal:
            softprompt.train(**{name: 1, **base})
        assert str(refusal.value) == WRONG[name]


def test_a_setting_that_was_not_given_is_not_blamed():
    with pytest.raises(ConfigError, match="--eval_steps 5 needs held-out rows") as refusal:
        softprompt.train(model_name_or_path="some/base", dataset="rows.jsonl", eval_steps=5)
    assert "eval_strategy" not in str(refusal.value)
    with pytest.raises(ConfigError, match=r"dataset='rows\.jsonl'"):
        softprompt.train("rows.jsonl")  # taken for a preset


def test_an_error_is_one_line_in_ipython():
    (line,) = ConfigError("two\nlines")._render_traceback_()
    assert line == "ConfigError: two lines"


@pytest.fixture
def interrupted_at_step_3(monkeypatch):
    """Ctrl-C during step 3."""
    on_step = RunCallbacks.on_step

    def on_step_with_signal(self, step):
        on_step(self, step)
        if step.number == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(RunCallbacks, "on_step", on_step_with_signal)


def test_an_interrupted_run_is_returned_in_an_interactive_session(
    run_settings, interrupted_at_step_3, capsys, monkeypatch
):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    run = softprompt.train(**run_settings)
    assert "softprompt.train(resume_from_checkpoint='run')" in run.stopped and run.stopped in capsys.readouterr().out
    assert run.metrics == {} and [record["step"] for record in run.history] == [3]
    assert torch.equal(run.model().prompt, load_adapter("run/checkpoint-3").prompt)
    assert run.stopped in repr(run) and "stopped after step 3 of 13" in run._repr_html_()
    ended = softprompt.train(resume_from_checkpoint=str(run.output_dir))
    assert ended.stopped is None and ended.history[-1]["step"] == 13


def test_an_interrupted_script_does_not_go_on(run_settings, interrupted_at_step_3):
    with pytest.raises(Stopped) as stop:
        softprompt.train(**run_settings)
    assert stop.value.exit_code == 130
    assert torch.equal(stop.value.run.model().prompt, load_adapter("run/checkpoint-3").prompt)


def test_a_second_interrupt_in_an_interactive_session_keeps_the_session(run_settings, monkeypatch):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)

    def twice(self, step):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(RunCallbacks, "on_step", twice)
    with pytest.raises(KeyboardInterrupt):
        softprompt.train(**run_settings)
