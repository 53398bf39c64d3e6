"""Programs under torchrun, and ranks without it: start them, find them, wait for them, read what they wrote."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers import watched
from helpers.fault_tools import SERVER, start_server

ROOT = Path(__file__).parents[2]
HELD = ["--eval_strategy", "steps", "--eval_steps", "20"]
RUN = ["--dataset", "mini:sentiment", "--max_steps", "40", "--save_steps", "8", "--logging_steps", "1", *HELD]


def torchrun(n, *command, **options):
    options.setdefault(
        "env", {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(n), "--standalone"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    return subprocess.Popen([*launcher, *map(str, command)], **{**pipes, **options})


class Ranks:
    """n ranks that call `main(folder, *given)`, as torchrun would start them, but forked from a process that has
    imported torch. Use it as a context, at whose end they are killed."""

    def __init__(self, n: int, main: Callable[..., object], folder: Path, *given: Any):
        start_server()
        folder.mkdir(parents=True, exist_ok=True)
        here, there = SERVER.Pipe()
        self.folder, self.store = folder, SERVER.Process(target=watched.store, args=(there,))
        self.store.start()
        port, silence = here.recv(), 60.0
        arguments = [(number, n, port, folder, silence, main, *given) for number in range(n)]
        self.processes = [SERVER.Process(target=watched.rank, args=one) for one in arguments]
        for process in self.processes:
            process.start()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *error: object) -> None:
        for process in (self.store, *self.processes):
            process.kill()
            process.join()

    def poll(self) -> int | None:
        """Return the exit code of a rank that has ended; None while all run."""
        return next((process.exitcode for process in self.processes if process.exitcode is not None), None)

    def communicate(self) -> tuple[str, str]:
        """Wait until all have ended. Return what they wrote to stdout and to stderr, one after the other."""
        for process in self.processes:
            process.join(200)
        files = ([self.folder / f"{name}-{n}" for n in range(len(self.processes))] for name in ("out", "err"))
        out, err = ("".join(file.read_text() for file in some) for some in files)
        return out, err


def ranks_of(n: int, main: Callable[..., object], folder: Path, *given: Any, code: int = 0) -> tuple[str, str]:
    """Run `Ranks` to their end, which must all end with exit code `code`. Return what they wrote."""
    with Ranks(n, main, folder, *given) as ranks:
        out, err = ranks.communicate()
        assert [process.exitcode for process in ranks.processes] == [code] * n, err
        return out, err


def finished(process, code=0):
    """Wait for a process, which must end with exit code `code`. Return what it wrote to stdout and stderr."""
    out, err = process.communicate(timeout=200)
    assert process.returncode == code, err
    return out, err


def pid_of(launcher, rank):
    """Wait until a rank runs. Return its process id."""
    while launcher.poll() is None:
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                mine = (folder / "stat").read_text().rpartition(")")[2].split()[1] == str(launcher.pid)
                if mine and f"\0RANK={rank}\0" in (folder / "environ").read_text():
                    return int(folder.name)
            except OSError:
                continue
        time.sleep(0.05)


def wait_for(path, launcher):
    """Wait until `path` exists; fail if the launcher ends first."""
    while not path.exists():
        assert launcher.poll() is None, launcher.communicate()[1]
        time.sleep(0.02)


def metrics_in(folder):
    """The records of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
