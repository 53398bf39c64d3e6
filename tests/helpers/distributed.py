"""Programs under torchrun: start them, find their ranks, wait for them, read what they wrote."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

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
