"""Real faults: killed processes, full disks, damaged files, hostile folders.

`pytest -m "slow or not slow" tests/runs/test_faults.py -s -n 0` runs all of them (minutes on two cores; -k: some)
and prints the table of docs/never-lost.md. Without `-m`, each fault is tried a few times only.
"""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from helpers import fault_tools
from helpers.fault_tools import Child, outcome, run
from helpers.fuzz import adapters_survived, data_files
from helpers.short_runs import ROWS
from hypothesis import HealthCheck, given
from hypothesis import settings as examples

from softprompt.config.command_line import parse_training
from softprompt.data.dataset import load_rows
from softprompt.data.template import Template
from softprompt.runs.checkpoints import checkpoints, fault_of
from softprompt.runs.train_state import find_checkpoint
from softprompt.utils.errors import CheckpointError

RESUME = ["--output_dir", "run", "--resume_from_checkpoint"]


def times(few: int, many: int):
    """Parametrize n: few by default, many among the slow tests."""
    return pytest.mark.parametrize("n", [few, pytest.param(many, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def table():
    """A function that notes how often a fault was tried and what followed; the table is printed at the end."""
    rows: dict[str, tuple[int, str]] = {}
    yield lambda fault, count, then: rows.update({fault: (count, then)})
    lines = [f"| {fault} | {count:,} | {then} |" for fault, (count, then) in rows.items()]
    print("\n\n| fault | times | each time |\n|---|---|---|\n" + "\n".join(lines))


@pytest.fixture(scope="module", autouse=True)
def server():
    fault_tools.start_server()


@pytest.fixture(scope="module")
def world(tiny_base, tmp_path_factory) -> tuple[list[str], tuple]:
    """Flags of a run of 13 steps that evaluates, keeps the best and saves often, and its outcome without faults."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    flags = {
        **{"model_name_or_path": tiny_base, "dataset": folder / "rows.jsonl", "eval_rows": 4, "max_steps": 13},
        **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 3, "save_steps": 2},
        **{"eval_steps": 3, "load_best_model_at_end": True, "save_total_limit": 3, "tokens_per_microbatch": 30},
        "engine": "packed",  # the faults are injected there; auto depends on the time that each engine takes
    }
    argv = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    code, told = run(folder, [*argv, "--output_dir", "run"])
    assert code == 0, told
    return argv, outcome(folder / "run")


def resumed(folder: Path, flags: list[str], expected: tuple) -> None:
    code, told = run(folder, [*flags, *RESUME])
    assert code == 0, told
    assert outcome(folder / "run") == expected
    assert not list((folder / "run").glob(".*")), "leftovers"
    assert all(fault_of(path) is None for path in checkpoints(folder / "run"))


def wait_until(condition, seconds: float = 200) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.001)


def saving(folder: Path) -> list[Path]:
    """The temporary folder of a checkpoint that is being written, if any."""
    return list((folder / "run").glob(".checkpoint-*"))


@times(2, 30)
def test_run_killed_at_a_random_moment_resumes_identically(n, world, tmp_path, table):
    flags, expected = world
    draw, found = random.Random(0), Counter()
    began = time.monotonic()
    (tmp_path / "whole").mkdir()
    assert run(tmp_path / "whole", [*flags, "--output_dir", "run"], fault_tools.slow_disk)[0] == 0
    duration = time.monotonic() - began
    for number in range(n):
        folder = tmp_path / str(number)
        folder.mkdir()
        child = Child(folder, [*flags, "--output_dir", "run"], fault_tools.slow_disk)
        if number % 2:  # at any moment
            time.sleep(draw.uniform(0.1, duration))
        else:  # while one of its checkpoints is being written
            step = draw.randrange(0, 5)
            wait_until(lambda at=step, at_=folder: saving(at_) and len(checkpoints(at_ / "run")) >= min(at, 2))
            time.sleep(draw.uniform(0, 0.08))
        child.kill()
        found["saving"] += bool(saving(folder))
        found["before the first checkpoint"] += not checkpoints(folder / "run")
        assert all(fault_of(path) is None for path in checkpoints(folder / "run"))
        resumed(folder, flags, expected)
        shutil.rmtree(folder)
    assert found["saving"] >= n // 4
    table("kill -9 at a random moment", n, f"{found['saving']} of them while saving; resumed, the same bytes")


@pytest.mark.slow
def test_run_killed_repeatedly_resumes_identically(world, tmp_path, table):
    (flags, expected), n = world, 10
    draw = random.Random(1)
    for _ in range(n):
        child = Child(tmp_path, [*flags, *RESUME], fault_tools.slow_disk)
        time.sleep(draw.uniform(0.5, 2))
        child.kill()
    resumed(tmp_path, flags, expected)
    table("one run killed again and again, resumed each time", n, "the same bytes")


SIGNALS = {
    "in the first step": fault_tools.signal_in_first_step,
    "mid-window": fault_tools.signal_mid_window,
    "during evaluation": fault_tools.signal_in_evaluation,
    "during saving": fault_tools.signal_while_saving,
}


@pytest.mark.parametrize("when", SIGNALS)
def test_sigterm_saves_and_the_run_resumes_identically(when, world, tmp_path, table):
    flags, expected = world
    code, told = run(tmp_path, [*flags, "--output_dir", "run"], SIGNALS[when])
    assert code == 143 and told[-1].startswith("stopped after step "), told
    resumed(tmp_path, flags, expected)
    table(f"SIGTERM {when}", 1, "saved, exit 143, resumed; the same bytes")


def test_second_signal_ends_the_run_without_saving(world, tmp_path, table):
    flags, expected = world
    code, told = run(tmp_path, [*flags, "--output_dir", "run"], fault_tools.two_signals_while_saving)
    assert code == 143 and not any("Traceback" in line for line in told)
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    resumed(tmp_path, flags, expected)
    table("a second SIGTERM, during saving", 1, "ended at once, resumed; the same bytes")


def one_line(told: list[str]) -> str:
    errors = [line for line in told if line.startswith("error: ")]
    assert len(errors) == 1 and told[-1] == errors[0] and not any("Traceback" in line for line in told), told
    return errors[0]


STARVED = {
    "the disk is full (a limit on file size)": (fault_tools.disk_full_at_step_5, "File too large"),
    "the folder becomes a file": (fault_tools.folder_becomes_a_file_at_step_5, "the folder is gone"),
    "the folder is removed": (fault_tools.folder_removed_at_step_5, "the folder is gone; there is no checkpoint yet"),
    "the folder becomes read-only": (fault_tools.folder_read_only_at_step_5, "Permission denied"),
}


SLOW = {fault: () for fault in STARVED} | {fault: pytest.mark.slow for fault in list(STARVED)[:2]}


@pytest.mark.parametrize("fault", [pytest.param(fault, marks=SLOW[fault]) for fault in STARVED])
def test_output_folder_that_becomes_unwritable_is_one_error_line(fault, world, tiny_base, table):
    flags, expected = world
    hook, reason = STARVED[fault]
    folder = Path(tempfile.mkdtemp())  # one that nobody may enter, too
    folder.chmod(0o777)
    try:
        shutil.copytree(tiny_base, folder / "base")
        shutil.copy(flags[flags.index("--dataset") + 1], folder / "rows.jsonl")
        flags = [*flags, "--model_name_or_path", "base", "--dataset", "rows.jsonl"]
        code, told = run(folder, [*flags, "--output_dir", "run"], hook)
        line = one_line(told)
        assert code == 1 and line.startswith("error: checkpoint-") and reason in line
        if (folder / "away").exists():
            (folder / "run").unlink()
            (folder / "away").rename(folder / "run")
        if (folder / "run").exists():
            (folder / "run").chmod(0o755)
            newest = checkpoints(folder / "run")[-1]
            assert newest.name == "checkpoint-4" and fault_of(newest) is None
            if "away" not in line and "becomes a file" not in fault:
                assert "checkpoint-4 is whole; continue with: python train.py --resume_from_checkpoint run" in line
        resumed(folder, flags, expected)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    left = "started anew" if "removed" in fault else "the last checkpoint whole; resumed"
    table(fault, 1, f"one line, exit 1, {left}, the same bytes")


def test_full_disk_is_one_error_line(world, tmp_path, table):
    """A file system of 160 KiB; skipped without the right to mount."""
    flags, expected = world
    (tmp_path / "run").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "none", str(tmp_path / "run")]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount")
    try:
        flags = [*flags, "--save_total_limit", "50"]
        code, told = run(tmp_path, [*flags, "--output_dir", "run"])
        line = one_line(told)
        assert code == 1 and "No space left on device" in line and "is whole; continue with" in line
        assert all(fault_of(path) is None for path in checkpoints(tmp_path / "run"))
        subprocess.run(["mount", "-o", "remount,size=9m", str(tmp_path / "run")], check=True)
        resumed(tmp_path, flags, expected)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "run")], check=True)
    table("the disk is full (a tmpfs of 160 KiB)", 1, "one line, exit 1, checkpoints whole; resumed, the same bytes")


@pytest.mark.parametrize(
    "hook, fault",
    [
        (fault_tools.metrics_unwritable_at_step_2, "metrics.jsonl cannot be written"),
        (fault_tools.terminal_gone_at_step_2, "the reader of the run's output is gone"),
        (fault_tools.clock_jumps, "the clock jumps by months, back and forth"),
    ],
)
def test_faults_that_do_not_stop_training(hook, fault, world, tmp_path, table):
    flags, expected = world
    code, told = run(tmp_path, [*flags, "--output_dir", "run"], hook)
    assert code == 0, told
    if hook is fault_tools.metrics_unwritable_at_step_2:
        of_metrics, *others = [line for line in told if line.startswith("warning: ")]
        assert "cannot be written (Is a directory); training goes on" in of_metrics
        assert all(line.startswith(("warning: no loss.png: ", "warning: no report.html: ")) for line in others)
        (tmp_path / "run" / "metrics.jsonl").rmdir()
        shutil.copy(checkpoints(tmp_path / "run")[-1] / "metrics.jsonl", tmp_path / "run")
        assert outcome(tmp_path / "run")[0] == expected[0]
    else:
        assert outcome(tmp_path / "run") == expected
    table(fault, 1, "training goes on; the same bytes")


def test_jumping_clock_affects_neither_time_limit_nor_folder_names(world, tmp_path):
    flags, _ = world
    code, _ = run(tmp_path, [*flags, "--max_steps", "100000", "--max_time", "1s"], fault_tools.clock_jumps)
    assert code == 124
    code, told = run(tmp_path, [*flags], fault_tools.clock_jumps)  # another run of the same second
    assert code == 0, told
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [
        "tiny-rows-20000101-000000",
        "tiny-rows-20000101-000000-2",
    ]


def test_second_process_on_an_output_folder_is_refused(world, tmp_path, table):
    flags, expected = world
    first = Child(tmp_path, [*flags, "--output_dir", "run"], fault_tools.slow_disk)
    wait_until(lambda: (tmp_path / "run" / "metrics.jsonl").exists())
    os.kill(first.pid, signal.SIGSTOP)  # a stopped process still holds its lock
    for number, more in enumerate([[], ["--resume_from_checkpoint"], ["--overwrite_output_dir"]]):
        second = Child(tmp_path, [*flags, "--output_dir", "run", *more], log=f"log{number}")
        code, told = second.ended()
        assert code == 2 and f"process {first.pid} is writing there" in one_line(told)
    os.kill(first.pid, signal.SIGCONT)
    assert first.ended()[0] == 0 and outcome(tmp_path / "run") == expected
    table("a second process on the same output_dir", 3, "refused, exit 2; the first unharmed")


def test_two_processes_started_in_the_same_second_get_two_folders(world, tmp_path):
    flags, expected = world
    both = [Child(tmp_path, flags, fault_tools.clock_jumps, log=f"log{n}") for n in range(2)]
    assert [child.ended()[0] for child in both] == [0, 0]
    assert [outcome(folder) for folder in sorted((tmp_path / "runs").iterdir())] == [expected, expected]


def test_crash_leaves_a_traceback_file_and_one_error_line(world, tmp_path, table):
    flags, expected = world
    code, told = run(tmp_path, [*flags, "--output_dir", "run"], fault_tools.a_fault_of_our_own_at_step_5)
    (file,) = (tmp_path / "run").glob("crash-*.txt")
    way_on = "run/checkpoint-4 is whole; continue with: python train.py --resume_from_checkpoint run"
    what = "unexpected ZeroDivisionError: of ***"
    assert code == 1 and one_line(told) == f"error: {what}; the traceback is in {file}; {way_on}"
    assert "Traceback" in file.read_text() and "not_to_be_told" not in file.read_text()
    resumed(tmp_path, flags, expected)
    table("a fault of the program itself", 1, "one line, the traceback in a file; resumed, the same bytes")


def spoiled(checkpoint: Path, flips: int):
    """Yield (damage, file, new content or None) for each file of a checkpoint: truncated, removed, replaced by another
    step's, one bit flipped."""
    draw, other = random.Random(0), checkpoint.with_name("checkpoint-2")
    for path in sorted(checkpoint.iterdir()):
        content = path.read_bytes()
        for length in sorted({0, 1, len(content) // 3, len(content) // 2, len(content) - 1}):
            yield "truncated", path, content[:length]
        yield "removed", path, None
        if (theirs := (other / path.name).read_bytes()) != content:
            yield "swapped with another step's", path, theirs
        for _ in range(flips):
            at, bit = draw.randrange(len(content)), 1 << draw.randrange(8)
            yield "one bit flipped", path, content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]


@times(3, 100)
def test_damaged_checkpoint_is_skipped_for_the_one_before(n, world, tmp_path, table):
    flags, _ = world
    code, told = run(
        tmp_path, [*flags, "--output_dir", "run", "--save_total_limit", "9"], fault_tools.signal_in_evaluation
    )
    assert code == 143, told
    flags = [*flags, "--output_dir", str(tmp_path / "run"), "--resume_from_checkpoint"]
    config, tried = parse_training(flags), Counter()
    older, newest = checkpoints(tmp_path / "run")[-2:]
    assert find_checkpoint(config) == newest
    for what, path, content in spoiled(newest, n):
        whole = path.read_bytes()
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with redirect_stdout(io.StringIO()) as out:
            assert find_checkpoint(config) == older, (what, path.name)
        assert out.getvalue().count("\n") == 1 and str(newest) in out.getvalue()
        path.write_bytes(whole)
        tried[what] += 1
    assert find_checkpoint(config) == newest
    older.rename(older.with_name("checkpoint-99"))
    assert find_checkpoint(config) == newest
    for what, count in tried.items():
        table(f"a checkpoint's file: {what}", count, "detected; the previous checkpoint is used")
    with pytest.raises(CheckpointError, match="it is of step 2"):
        find_checkpoint(parse_training(["--resume_from_checkpoint", str(tmp_path / "run/checkpoint-99")]))


@times(100, 5000)
def test_any_data_file_is_accepted_or_refused(n, tmp_path, table):
    seen = Counter()

    @examples(max_examples=n, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(data_files())
    def one(file):
        path = tmp_path / file.name
        path.write_bytes(file.content)
        seen[file.check(path, load_rows, Template())] += 1

    one()
    assert seen["accepted"] >= n // 20 and seen["refused with its row"] >= n // 20
    told = (
        f"{seen['accepted']:,} accepted, {seen['refused with its row']:,} refused with the row named, "
        f"{seen['refused']:,} as a whole"
    )
    table("random rows and files (made by hypothesis)", sum(seen.values()), told)


@times(60, 1000)
def test_any_adapter_folder_is_accepted_or_refused(n, tiny_base, tmp_path, table):
    result = adapters_survived(n, tiny_base, tmp_path)
    assert result["faults"] == [] and result["events"] == []
    assert result["accepted"] and result["refused"]
    told = f"{result['accepted']:,} accepted, {result['refused']:,} refused; no other exception, no import, no network"
    table("mutated adapter folders", n, told)


def test_audit_hook_notices_harm(tiny_base, tmp_path):
    """Otherwise the test above could not fail."""
    events = adapters_survived(1, tiny_base, tmp_path, guilty=True)["events"]
    assert {event.split()[0] for event in events} >= {"import", "socket.connect", "pickle.find_class", "os.system"}
