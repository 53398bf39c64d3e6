"""--report_to tensorboard, read back with TensorBoard's own reader. Most tests need the package tensorboard."""

import json
import sys
from pathlib import Path

import pytest
from helpers.programs import refused
from helpers.reported_runs import settings_in
from helpers.short_runs import interrupted

import softprompt
import train
from softprompt.training import tensorboard as board

try:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
except ImportError:
    EventAccumulator = None

needs_tensorboard = pytest.mark.skipif(EventAccumulator is None, reason="tensorboard is not installed")
NAMES = {"loss": "train/loss", "learning_rate": "train/learning_rate", "grad_norm": "train/grad_norm"}
NAMES |= {"eval_loss": "eval/loss", "eval_perplexity": "eval/perplexity", "eval_exact_match": "eval/exact_match"}
NAMES |= {"tokens_per_second": "train/tokens_per_second", "epoch": "train/epoch"}


@pytest.fixture
def settings(tiny_base, tmp_path) -> dict:
    return settings_in(tmp_path, tiny_base) | {"report_to": "tensorboard", "logging_steps": 1}


def curves(output_dir: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(output_dir / "runs"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_equals_metrics(output_dir: Path) -> None:
    records = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    found = curves(output_dir)
    for name, tag in NAMES.items():
        expected = [(r["step"], r[name]) for r in records if name in r]
        assert found[tag] == [(step, pytest.approx(value, rel=1e-5)) for step, value in expected], tag


@needs_tensorboard
def test_scalars_are_the_metrics_under_trainer_names(settings, tmp_path):
    run = softprompt.train(**settings)
    assert_equals_metrics(tmp_path / "run")
    found = curves(tmp_path / "run")
    assert found["train/train_loss"] == [(6, pytest.approx(run.metrics["train_loss"]))]
    assert found["eval/loss_base"] == [(6, pytest.approx(run.metrics["eval_loss_base"]))]


@needs_tensorboard
def test_each_argument_is_one_line_of_the_table(settings, tmp_path):
    softprompt.train(**settings, template="A|{instruction}\nB: ")
    events = EventAccumulator(str(tmp_path / "run" / "runs")).Reload()
    (told,) = events.Tensors("args/text_summary")
    assert r"| template | A\|{instruction}\nB:  |" in told.tensor_proto.string_val[0].decode().splitlines()


@needs_tensorboard
def test_tags_equal_transformers():
    from transformers.integrations import rewrite_logs

    for name in NAMES:
        assert [board.tag(name)] == list(rewrite_logs({name: 1.0}))


@needs_tensorboard
@pytest.mark.parametrize("kept", [True, False], ids=["events there", "events lost"])
def test_a_resumed_run_has_one_curve(kept, settings, tmp_path):
    interrupted({**settings, "save_steps": 3}, 5)  # step 4 was logged, the newest checkpoint is of step 3
    if not kept:
        for path in (tmp_path / "run/runs").iterdir():
            path.unlink()
    softprompt.train(resume_from_checkpoint=str(tmp_path / "run"))
    assert_equals_metrics(tmp_path / "run")


@needs_tensorboard
def test_overwriting_a_run_starts_new_curves(settings, tmp_path):
    softprompt.train(**settings)
    (tmp_path / "run/runs/mine").touch()
    softprompt.train(**{**settings, "max_steps": 2, "overwrite_output_dir": True})
    assert_equals_metrics(tmp_path / "run")
    assert (tmp_path / "run/runs/mine").exists()


@needs_tensorboard
def test_unwritable_event_folder_is_a_warning(settings, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/runs").write_text("in the way")
    softprompt.train(**settings)
    lines = [line for line in capsys.readouterr().err.splitlines() if "TensorBoard" in line]
    assert len(lines) == 1 and "cannot be written" in lines[0] and "training goes on" in lines[0]
    assert (tmp_path / "run/all_results.json").exists()


def test_run_is_refused_without_the_package(settings, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    argv = [part for name, value in settings.items() for part in (f"--{name}", value)]
    assert "pip install tensorboard" in refused(train, argv, capsys, monkeypatch, tmp_path)
    assert "choose from 'none', 'tensorboard'" in refused(
        train, ["--report_to", "wandb"], capsys, monkeypatch, tmp_path
    )


def test_no_events_by_default(settings, tmp_path):
    softprompt.train(**{**settings, "report_to": "none", "max_steps": 1})
    assert not (tmp_path / "run/runs").exists()
