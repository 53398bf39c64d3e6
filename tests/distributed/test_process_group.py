"""Several ranks train as one process does, write one set of files, and stop and resume together."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
from helpers import ranks, watched
from helpers.distributed import ROOT, RUN, finished, metrics_in, pid_of, ranks_of, torchrun, wait_for
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from softprompt.config.loader import train_config
from softprompt.config.train_args import NEWEST
from softprompt.distributed.process_group import World
from softprompt.distributed.row_assignment import assign_rows
from softprompt.runs.checkpoints import with_checksums
from softprompt.runs.file_names import OF_A_CHECKPOINT, STATE_FILE
from softprompt.training.auto_resume import has_saved, with_auto_resume
from softprompt.training.run import _refuse_unlike
from softprompt.utils.atomic_io import write_folder
from softprompt.utils.errors import ConfigError
from softprompt.utils.torchrun_env import launch_ids


def prompt_in(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 7))
def test_rows_are_assigned_evenly(lengths, size):
    assigned = assign_rows(lengths, size)
    assert len(assigned) == size and sorted(row for rows in assigned for row in rows) == list(range(len(lengths)))
    loads = [sum(lengths[row] for row in rows) for rows in assigned]
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_a_single_process_communicates_with_nobody():
    world = World()
    assert world.is_main and world.all_gather({"a": 1}) == [{"a": 1}] and world.run_on_all(lambda: 3) == 3
    assert world.share_stop_request(request := object()) is request


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def of_ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    ranks_of(request.param, ranks.main, folder)
    return folder


@pytest.mark.parametrize("name", ranks.CASES)
def test_ranks_train_as_a_single_process_does(of_ranks, name):
    near = 1e-6 if ranks.CASES[name][1] == ranks.FP32 else 2e-3  # in bf16 other batches round differently
    steps, values, held_out = ranks.run(name)
    theirs = json.loads((of_ranks / f"{name}.json").read_text())
    for one, other in zip(steps, theirs["steps"], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=near)
        assert {**one, "seconds": 0, "loss": 0, "grad_norm": 0} == {**other, "seconds": 0, "loss": 0, "grad_norm": 0}
    prompt = load_file(of_ranks / f"{name}.safetensors")["prompt"]
    assert (prompt - values).norm() / values.norm() < 10 * near
    assert theirs["targets"] == held_out["targets"]
    assert theirs["answers"] == held_out["answers"] or ranks.CASES[name][1] != ranks.FP32
    for what in ("loss", "bare", "each"):
        assert theirs[what] == pytest.approx(held_out[what], rel=10 * near)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    place = tmp_path_factory.mktemp("undisturbed")
    flags = [*RUN, "--per_device_train_batch_size", 4, "--output_dir", place / "run"]
    return place / "run", *ranks_of(2, watched.trains_here, place, *flags)


def test_ranks_write_one_set_of_files(undisturbed):
    folder, out, err = undisturbed
    assert "40 optimizer steps of 8 rows (2 × 4 × 1, devices × batch × accumulation)" in out
    assert out.count("exact match") == 1 and "packed engine, 1,024 tokens at a time, 2 processes" in out
    assert len(re.findall("^step 7 ", err, re.M)) == 1
    assert [r["step"] for r in metrics_in(folder) if "loss" in r] == list(range(1, 41))
    assert [r["step"] for r in metrics_in(folder) if "eval_loss" in r] == [20, 40]
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (16, 24, 32, 40, 8)]


def test_a_killed_rank_is_named_and_the_run_resumes_by_itself(undisturbed, tmp_path):
    folder = tmp_path / "run"
    command = ["train.py", *RUN, "--per_device_train_batch_size", 4, "--output_dir", folder]
    launcher = torchrun(2, "--max-restarts", 1, "--monitor-interval", 3, *command)
    wait_for(folder / "checkpoint-16", launcher)
    pid = pid_of(launcher, 1)
    os.kill(pid, signal.SIGKILL)
    out, err = finished(launcher)
    assert f"rank 0: rank 1 (process {pid}) died" in err
    assert "resuming after step" in out
    assert prompt_in(folder) == prompt_in(undisturbed[0])
    assert [r["step"] for r in metrics_in(folder) if "loss" in r] == list(range(1, 41))


@pytest.mark.slow
def test_a_stop_request_of_one_rank_stops_all_and_one_process_resumes(undisturbed, tmp_path):
    folder = tmp_path / "run"
    launcher = torchrun(2, "train.py", *RUN, "--per_device_train_batch_size", 4, "--output_dir", folder)
    wait_for(folder / "checkpoint-8", launcher)
    os.kill(pid_of(launcher, 1), signal.SIGTERM)
    _, err = finished(launcher, 1)  # torchrun's own exit code, whatever a rank's
    step = int(re.search(r"stopped after step (\d+) of 40, which is saved", err)[1])
    assert (folder / f"checkpoint-{step}").is_dir() and "exitcode  : 143" in err
    again = [sys.executable, "train.py", "--resume_from_checkpoint", str(folder)]
    out = subprocess.run(again, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"resuming after step {step} of 40" in out and "40 optimizer steps of 8 rows" in out
    mine, theirs = (load_file(f / "adapter_model.safetensors")["prompt_embeddings"] for f in (folder, undisturbed[0]))
    assert (mine - theirs).norm() / theirs.norm() < 1e-5
    assert [r["step"] for r in metrics_in(folder) if "loss" in r] == list(range(1, 41))


def test_bad_input_is_reported_once(tmp_path):
    flags = ["--dataset", tmp_path / "none.jsonl", "--output_dir", tmp_path / "run"]
    _, err = ranks_of(2, watched.trains_here, tmp_path / "told", *flags, code=2)
    assert err.count("error: ") == 1 and "none.jsonl" in err and not (tmp_path / "run").exists()


def test_a_run_that_may_be_restarted_needs_an_output_dir(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    with pytest.raises(ConfigError, match="--max-restarts finds a run again by its folder"):
        with_auto_resume(train_config("mini"), False)


def saved(folder, step, *starts):
    state = {STATE_FILE: json.dumps({"step": step, "starts": starts}).encode()}
    write_folder(folder / f"checkpoint-{step}", with_checksums({name: b"" for name in OF_A_CHECKPOINT} | state))


def test_a_restart_resumes_only_from_checkpoints_of_its_own_launch(tmp_path):
    """A restart also follows a refused launch; the folder may contain checkpoints of other launches, of fewer nodes, or
    of an earlier run of the same script."""
    config = train_config("mini", output_dir=str(tmp_path), overwrite_output_dir=True)
    assert not has_saved(config, [["a", "1"]])
    saved(tmp_path, 16, ["another", "1"])
    assert not has_saved(config, [["a", "2"]])
    saved(tmp_path, 24, ["a", "3"], ["b", "4"])
    assert has_saved(config, [["a", "5"], ["c", "6"]])
    assert not has_saved(config, [["c", "5"]]) and not has_saved(config, [["a", "5"], ["b", "4"]])
    assert not has_saved(config, [])
    saved(tmp_path, 32)  # by a single process
    assert not has_saved(config, [["a", "5"]])
    again = with_auto_resume(config, True).training
    assert again.resume_from_checkpoint == NEWEST and not again.overwrite_output_dir
    assert with_auto_resume(config, False) is config


def test_a_launch_has_the_same_name_at_each_restart(monkeypatch):
    """Even if a shell script runs between torchrun and Python."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/tmp/torchelastic_x/none_y/attempt_0/1/error.json")
    launch, process = launch_ids()
    assert launch.endswith("/tmp/torchelastic_x/none_y") and str(os.getpid()) in process
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/tmp/torchelastic_x/none_y/attempt_1/0/error.json")
    assert launch_ids()[0] == launch
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "")
    assert launch_ids()[0] != launch and str(os.getppid()) in launch_ids()[0]


def test_ranks_with_other_settings_or_data_are_named():
    mine = {"last step done": 24, "dataset": "one", "base": "x"}
    _refuse_unlike([mine, {"last step done": 24, "dataset": "one"}])  # of a sharded base rank 0 alone knows it
    other = {"last step done": 16, "dataset": "two"}
    with pytest.raises(ConfigError, match="rank 2 has another last step done and another dataset than rank 0"):
        _refuse_unlike([mine, mine, other])


@pytest.mark.slow
def test_restarts_do_not_overwrite_another_run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    _, err = finished(torchrun(2, "--max-restarts", 1, "train.py", *RUN, "--output_dir", folder), 1)
    assert err.count("would be replaced") == 2 and (folder / "adapter_config.json").read_text() == "{}"


@pytest.mark.slow
def test_a_run_that_max_time_stopped_is_not_restarted(tmp_path):
    folder = tmp_path / "run"
    command = ["train.py", *RUN, "--max_steps", 4000, "--max_time", "1s", "--output_dir", folder]
    _, err = finished(torchrun(2, "--max-restarts", 1, *command))
    assert err.count("which is saved") == 1


FROM_PYTHON = """
import softprompt
for name in "aba":
    run = softprompt.train(dataset="mini:sentiment", max_steps=3, output_dir=name, overwrite_output_dir=True)
    print(name, run.metrics["epoch"])
"""


@pytest.mark.slow
def test_several_runs_from_python_under_torchrun(tmp_path):
    """Each run joins the process group and leaves it; only rank 0 prints."""
    (tmp_path / "two.py").write_text(FROM_PYTHON)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    out, _ = finished(torchrun(2, "two.py", cwd=tmp_path, env=env))
    assert "resuming" not in out
    assert out.count("2 processes") == 3 and out.count("\na ") == 4  # one line from each script
    assert prompt_in(tmp_path / "a") == prompt_in(tmp_path / "b")
