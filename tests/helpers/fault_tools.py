"""Training runs in processes of their own, in which faults are injected by hooks.

They are forked from a server that has imported torch, so that a run takes about a second.
"""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
from helpers.short_runs import WITHOUT_PICTURES
from tqdm import tqdm

import train
from softprompt.cli import run_command
from softprompt.engines import prefix_schedule
from softprompt.evaluation.evaluator import Evaluator
from softprompt.training import loop as trainer
from softprompt.training.callbacks import RunCallbacks

SERVER = multiprocessing.get_context("forkserver")
NOBODY = 65534


def start_server() -> None:
    """Start the fork server, with this module and torch imported. It finds the module through PYTHONPATH."""
    here = Path(__file__).parents[1]
    before, os.environ["PYTHONPATH"] = os.environ.get("PYTHONPATH"), f"{here}{os.pathsep}{here.parent}"
    SERVER.set_forkserver_preload(["helpers.fuzz"])
    forkserver.ensure_running()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


class Child:
    """A run of train.py with `flags`, in `folder`; `hook(folder)` is called before. stdout and stderr go to
    `folder`/`log`."""

    def __init__(self, folder: Path, flags: list[str], hook: Callable[[Path], object] | None = None, log: str = "log"):
        self.log = folder / log
        self.process = SERVER.Process(target=_child, args=(folder, [str(f) for f in flags], hook, self.log))
        self.process.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def ended(self) -> tuple[int, list[str]]:
        """Wait for the end. Return the exit code and the lines of the log."""
        self.process.join(300)
        assert self.process.exitcode is not None, "it hangs: " + self.log.read_text()
        return self.process.exitcode, self.log.read_text().splitlines()


def _child(folder: Path, flags: list[str], hook: Callable[[Path], object] | None, log: Path) -> None:
    os.chdir(folder)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its default lock is shared between processes, and a killed one may hold it
    sys.modules |= WITHOUT_PICTURES
    if hook:
        hook(folder)
    sys.argv = ["train.py", *flags]
    try:
        run_command(train.main)
    finally:
        os.seteuid(os.getuid())


def run(folder: Path, flags: list[str], hook: Callable[[Path], object] | None = None) -> tuple[int, list[str]]:
    """Run train.py to its end. Return the exit code and the lines that it wrote."""
    return Child(folder, flags, hook).ended()


def outcome(folder: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """What two equal runs have in common: the prompt's bytes, and the metrics without speeds."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    plain = [{name: value for name, value in r.items() if name != "tokens_per_second"} for r in records]
    return (folder / "adapter_model.safetensors").read_bytes(), plain


def before(owner: object, name: str, count: int, act: Callable[[], object]) -> None:
    """Call `act` just before the `count`-th call of the function `owner`.`name`."""
    original, calls = getattr(owner, name), iter(range(1, 1 << 30))

    def called(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == count:
            act()
        return original(*args, **kwargs)

    setattr(owner, name, called)


# Hooks. Each is called in the process of the run, before anything else, with the folder that it runs in.


def on_flush(act: Callable[[Path, int], object]) -> None:
    """Call `act` with the path and the descriptor of each file that the run has written, before it is flushed."""
    flush = os.fsync

    def called(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            act(Path(os.readlink(f"/proc/self/fd/{descriptor}")), descriptor)
        flush(descriptor)

    os.fsync = called


def slow_disk(folder: Path) -> None:
    """Write each file slowly, in three pieces."""

    def write(path: Path, descriptor: int) -> None:
        content = path.read_bytes()
        os.ftruncate(descriptor, 0)
        for start in range(0, max(1, len(content)), -(-max(1, len(content)) // 3)):
            os.pwrite(descriptor, content[start : start + -(-len(content) // 3)], start)
            time.sleep(0.004)

    on_flush(write)


def _signal() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)


def signal_in_first_step(folder: Path) -> None:
    before(trainer, "optimizer_step", 1, _signal)


def signal_mid_window(folder: Path) -> None:
    before(prefix_schedule, "collate_packed", 4, _signal)  # each window has several micro-batches


def signal_in_evaluation(folder: Path) -> None:
    before(Evaluator, "__call__", 2, _signal)


def before_checkpoint_file(step: int, act: Callable[[], object]) -> None:
    """Call `act` when the first file of checkpoint-`step` has been written, before the second one is."""
    seen = []

    def flushed(path: Path, descriptor: int) -> None:
        if path.parent.name.startswith(f".checkpoint-{step}-"):
            seen.append(path)
            if len(seen) == 1:
                act()

    on_flush(flushed)


def signal_while_saving(folder: Path) -> None:
    before_checkpoint_file(2, _signal)


def two_signals_while_saving(folder: Path) -> None:
    before_checkpoint_file(3, lambda: (_signal(), _signal()))


def disk_full_at_step_5(folder: Path) -> None:
    """Limit the size of files to 3,000 bytes."""
    before(RunCallbacks, "on_step", 5, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)))


def folder_removed_at_step_5(folder: Path) -> None:
    before(RunCallbacks, "on_step", 5, lambda: shutil.rmtree(folder / "run"))


def folder_read_only_at_step_5(folder: Path) -> None:
    """Make the output folder read-only. Root may write anyway, so it becomes another user instead."""
    root = os.geteuid() == 0
    before(RunCallbacks, "on_step", 5, lambda: os.seteuid(NOBODY) if root else (folder / "run").chmod(0o555))


def folder_becomes_a_file_at_step_5(folder: Path) -> None:
    before(RunCallbacks, "on_step", 5, lambda: ((folder / "run").rename(folder / "away"), (folder / "run").touch()))


def metrics_unwritable_at_step_2(folder: Path) -> None:
    path = folder / "run" / "metrics.jsonl"
    before(RunCallbacks, "on_step", 2, lambda: (path.unlink(), path.mkdir()))


def terminal_gone_at_step_2(folder: Path) -> None:
    """Close the pipe that stderr goes to, as a terminal that is closed."""

    def close() -> None:
        read, write = os.pipe()
        os.dup2(write, 2)
        os.close(read)
        os.close(write)

    before(RunCallbacks, "on_step", 2, close)


def clock_jumps(folder: Path) -> None:
    """Make time.time jump back and forth by four months at each call, and fix the time in folder names."""
    real, jumps = time.time, iter(range(1, 1 << 30))
    time.time = lambda: real() + (-1) ** next(jumps) * 1e7
    time.strftime = lambda form: "20000101-000000"


def a_fault_of_our_own_at_step_5(folder: Path) -> None:
    os.environ["HF_TOKEN"] = "not_to_be_told"

    def fault() -> None:
        raise ZeroDivisionError(f"of {os.environ['HF_TOKEN']}")

    before(RunCallbacks, "on_step", 5, fault)
