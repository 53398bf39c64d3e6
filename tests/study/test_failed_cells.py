"""Cells that fail: they are shown, the others run, and the next run of the study tries them again."""

import json
import os
import re
import shutil
import signal
import sys
import weakref

import pytest
import torch
from helpers.study_files import Counted

from softprompt.cli import run_command
from softprompt.cli import study as study_command
from softprompt.study import cell_runner, runner
from softprompt.study import plan as study_plan
from softprompt.study.plan import plan_study
from softprompt.study.results import read_finished
from softprompt.study.study import run_study
from softprompt.utils.errors import DataError, ModelError, PartialFailureError, Stopped


class Failing:
    """Replaces a function of a module with one that fails if `when` is true of its arguments."""

    def __init__(self, monkeypatch, module, name, when, error):
        self.when, self.error, self.real = when, error, getattr(module, name)
        monkeypatch.setattr(module, name, self)

    def __call__(self, *args, **kwargs):
        if self.when(*args):
            raise type(self.error)(*self.error.args)  # a new one: it would keep the frames of those before
        return self.real(*args, **kwargs)


def of_three(engine, prompt, *_):
    return len(prompt.weight) == 3


ERRORS = {
    "of a library": (AttributeError("no\nsuch | thing"), r"AttributeError: no such \| thing"),
    "out of memory": (torch.OutOfMemoryError("CUDA out of memory"), "out of memory; give a smaller batch"),
    "of ours": (DataError("row 7: no answer"), "row 7: no answer"),
    "of Python": (RecursionError(), "unexpected RecursionError"),
}


@pytest.mark.parametrize("error, told", ERRORS.values(), ids=ERRORS)
def test_a_failed_cell_is_shown_and_the_others_run(error, told, place, monkeypatch, capsys):
    study = place("seeds = [0, 1]", "[[grid]]\nnum_virtual_tokens = [1, 3, 2]")
    with monkeypatch.context() as patch:
        Failing(patch, cell_runner, "train", of_three, error)
        with pytest.raises(PartialFailureError, match="2 of 6 cells failed") as failed:
            run_study(study)
    assert failed.value.exit_code == 1 and "num_virtual_tokens 3" in str(failed.value)
    done = [one for one in plan_study(study) if read_finished(one.folder)]
    assert [one.cell.config.prompt.num_virtual_tokens for one in done] == [1, 1, 2, 2]
    page = (place.folder / "out" / "study.md").read_text(encoding="utf-8")
    assert "## Cells that failed" in page and told in page and "| SAMPLE_VOCAB | 3 | 2 | failed |  |" in page
    assert "6 cells, of which 2 failed," in page and "(1 to 2)" in page  # what failed is not compared
    traces = list((place.folder / "out" / "cells").glob("*.error.txt"))
    assert len(traces) == (0 if isinstance(error, DataError) else 2)
    assert all("Traceback" in trace.read_text(encoding="utf-8") for trace in traces)
    trained = Counted(monkeypatch, cell_runner, "train")
    run_study(study)  # tries again what failed, and that alone
    page = (place.folder / "out" / "study.md").read_text(encoding="utf-8")
    assert trained.calls == 2 and "that failed" not in page and "| failed |" not in page
    assert not list((place.folder / "out" / "cells").glob("*.error.txt"))


def test_the_table_counts_failed_seeds(place, monkeypatch):
    study = place("seeds = [0, 1, 2]", "[[grid]]\nnum_virtual_tokens = 3")
    Failing(monkeypatch, cell_runner, "train", lambda e, p, feed, args, *_: args.seed == 1, ValueError("no"))
    with pytest.raises(PartialFailureError):
        run_study(study)
    left = [read_finished(one.folder)["metrics"]["eval_loss"] for one in plan_study(study) if read_finished(one.folder)]
    page = (place.folder / "out" / "study.md").read_text(encoding="utf-8")
    assert f"| SAMPLE_VOCAB | 3 | 3 | {sum(left) / 2:.4f} ± " in page and "(1 failed) |" in page


@pytest.mark.parametrize("broken", ["weights", "inputs_embeds"])
def test_a_broken_base_is_shown_and_the_others_run(broken, place, tmp_path, tiny_base, monkeypatch):
    shutil.copytree(tiny_base, bad := tmp_path / "bad")
    if broken == "weights":
        (weights,) = bad.glob("*.safetensors")
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        error = ModelError("takes no inputs_embeds")
        Failing(monkeypatch, cell_runner, "load_base", lambda path, *_: "bad" in str(path), error)
    grid = f"[[grid]]\nmodel_name_or_path = {json.dumps([str(bad), str(tiny_base)])}"
    with pytest.raises(PartialFailureError, match="3 of 6 cells failed"):
        run_study(place("seeds = [0, 1]\nvoting = ['majority_vote']", grid))
    page = (place.folder / "out" / "study.md").read_text(encoding="utf-8")
    assert "3 cells, the first base " in page and f"| {tiny_base} | SAMPLE_VOCAB |" in page
    assert re.search(rf"^\| {re.escape(str(bad))} \| no prompt \|.*\| failed \|", page, re.M)


def test_an_error_of_a_library_in_some_rows_fails_their_cells(place, tmp_path, monkeypatch):
    (tmp_path / "more.jsonl").write_text((tmp_path / "rows.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    error = ZeroDivisionError("in a tokenizer")
    failing = Failing(monkeypatch, study_plan, "tokenize_rows", lambda config, *_: "more" in config.data.dataset, error)
    grid = f"[[grid]]\ndataset = {json.dumps([str(tmp_path / name) for name in ('more.jsonl', 'rows.jsonl')])}"
    study = place("seeds = [0, 1]\nvoting = ['majority_vote']", grid)
    with pytest.raises(PartialFailureError, match=r"3 of 6 cells failed .*in a tokenizer"):
        run_study(study)
    failing.when = lambda *_: False
    run_study(study)


def test_existing_rows_that_are_refused_fail_their_cells(place, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"instruction": "a"}) + "\n", encoding="utf-8")
    grid = f"[[grid]]\ndataset = {json.dumps([str(bad), str(tmp_path / 'rows.jsonl')])}"
    with pytest.raises(PartialFailureError, match=r"1 of 2 cells failed .*bad\.jsonl"):
        run_study(place(grid=grid))
    page = (place.folder / "out" / "study.md").read_text(encoding="utf-8")
    assert "## Cells that failed" in page and f"| {tmp_path / 'rows.jsonl'} | SAMPLE_VOCAB |" in page
    with pytest.raises(DataError):  # and there is nothing else to run
        run_study(place(grid=f"[[grid]]\ndataset = {json.dumps(str(bad))}"))


def test_an_ensemble_with_a_failed_member_fails_and_is_tried_again(place, monkeypatch):
    study = place("seeds = [0, 1]\nvoting = ['majority_vote']", "[[grid]]\nnum_virtual_tokens = 3")
    with monkeypatch.context() as patch:
        Failing(patch, cell_runner, "train", lambda e, p, feed, args, *_: args.seed == 1, ValueError("no"))
        with pytest.raises(PartialFailureError, match="2 of 3 cells failed"):
            run_study(study)
    assert "1 of the ensemble's 2 prompts failed" in (place.folder / "out" / "study.md").read_text(encoding="utf-8")
    run_study(study)
    assert all(read_finished(one.folder) for one in plan_study(study))


def test_a_study_whose_cells_all_failed_has_a_page(place, monkeypatch):
    Failing(monkeypatch, cell_runner, "train", lambda *_: True, ValueError("no"))
    with pytest.raises(PartialFailureError, match="1 of 1 cells failed"):
        run_study(place())
    assert "ValueError: no" in (place.folder / "out" / "study.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(130), OSError(28, "No space left on device")])
def test_interrupts_and_write_errors_end_the_study(error, place, monkeypatch):
    module, name = (runner, "write_folder") if isinstance(error, OSError) else (cell_runner, "train")
    Failing(monkeypatch, module, name, lambda *_: True, error)
    with pytest.raises(type(error)):
        run_study(place("seeds = [0, 1]"))


def test_a_signal_stops_the_study_even_if_the_cell_fails(place, monkeypatch):
    def train(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        raise ValueError("no")

    monkeypatch.setattr(cell_runner, "train", train)
    with pytest.raises(Stopped) as stopped:
        run_study(place("seeds = [0, 1]"))
    assert stopped.value.exit_code == 143


def test_the_command_exits_with_1_if_a_cell_failed(place, monkeypatch, capsys):
    place("seeds = [0, 1]")
    Failing(monkeypatch, cell_runner, "train", lambda e, p, feed, args, *_: args.seed == 1, ValueError("no"))
    monkeypatch.setattr(sys, "argv", ["study", str(place.folder / "s.toml")])
    with pytest.raises(SystemExit) as ended:
        run_command(study_command)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 1 and len(said) == 1 and "ValueError: no" in said[0] and "study.md" in said[0]


@pytest.mark.parametrize("fails", [False, True])
def test_a_base_is_freed_before_the_next_one_is_loaded(fails, place, tmp_path, tiny_base, monkeypatch):
    """No tensor of it exists when the next base is read, even if a cell failed with an error that referred to it."""
    shutil.copytree(tiny_base, tmp_path / "twin")
    alive, real = [], cell_runner.load_base

    def load_base(*args):
        assert not [ref for ref in alive if ref() is not None]
        base = real(*args)
        alive.extend(map(weakref.ref, [*base.parameters(), *base.buffers()]))
        return base

    monkeypatch.setattr(cell_runner, "load_base", load_base)
    study = place(
        "seeds = [0, 1]\nvoting = ['majority_vote']",
        "[[grid]]\nnum_virtual_tokens = 3\nengine = ['packed', 'padded']\n"
        f"model_name_or_path = {json.dumps([str(tiny_base), str(tmp_path / 'twin')])}",
    )
    if fails:
        Failing(monkeypatch, cell_runner, "train", lambda e, p, feed, args, *_: args.seed == 1, RuntimeError("no"))
        with pytest.raises(PartialFailureError, match="8 of 12 cells failed"):
            run_study(study)
    else:
        run_study(study)
    assert alive
