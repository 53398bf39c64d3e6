"""Several nodes, simulated by several torchruns or folders on one machine: they restart together."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.distributed import ROOT, RUN, finished, metrics_in, torchrun, wait_for

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def node(port, *command):
    """Start one of two nodes, with one rank each."""
    where = [
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=localhost:{port}",
        "--rdzv_id=x",
    ]
    launcher = [sys.executable, "-m", "torch.distributed.run", *where, "--max-restarts=3", "--monitor-interval=1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT, "env": ENV}
    return subprocess.Popen([*launcher, *map(str, command)], **pipes)


def worker_of(launcher):
    """Return the process id and the rank of the worker that a torchrun started."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "stat").read_text().rpartition(")")[2].split()[1] == str(launcher.pid):
                variables = dict(v.split("=", 1) for v in (folder / "environ").read_text().split("\0") if "=" in v)
                if "RANK" in variables:
                    return int(folder.name), int(variables["RANK"])
        except OSError:
            continue
    raise AssertionError("no worker")


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_nodes_restart_together(killed, tmp_path):
    """Each torchrun counts only its own restarts."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    folder = tmp_path / "run"
    nodes = [node(port, "train.py", *RUN, "--output_dir", folder) for _ in range(2)]
    wait_for(folder / "checkpoint-16", nodes[0])
    pid = next(pid for pid, rank in map(worker_of, nodes) if rank == killed)
    os.kill(pid, signal.SIGKILL)
    told = "".join("".join(finished(each)) for each in nodes)
    assert f"rank {1 - killed}: rank {killed} (process {pid}) died" in told and "resuming after step" in told
    assert "torchrun --nproc_per_node=1 --nnodes=2 … train.py --resume_from_checkpoint" in told
    assert [r["step"] for r in metrics_in(folder) if "loss" in r] == list(range(1, 41))


NODES = """
import os, sys
rank = int(os.environ["RANK"])
sys.argv += ["--output_dir", "run" if rank == 0 else "elsewhere"]
if rank == 1 and os.environ["OTHER"] == "rows":
    sys.argv += ["--dataset", "mini:reply"]
import softprompt, train
from softprompt.cli import run_command
run_command(train.main)
"""


@pytest.mark.slow
def test_nodes_with_separate_disks(tmp_path):
    """Rank 1 does not see rank 0's output folder, or reads other rows."""
    (tmp_path / "node.py").write_text(NODES)
    short = ["--dataset", "mini:sentiment", "--max_steps", 4, "--save_steps", 2]
    first = torchrun(2, "node.py", *short, cwd=tmp_path, env=ENV | {"OTHER": ""})
    finished(first)
    assert (tmp_path / "run" / "checkpoint-4").is_dir() and not (tmp_path / "elsewhere").exists()
    again = torchrun(2, "node.py", "--resume_from_checkpoint", cwd=tmp_path, env=ENV | {"OTHER": ""})
    assert "rank 1 has another last step done" in finished(again, 1)[1]
    other = torchrun(2, "node.py", *short, "--overwrite_output_dir", cwd=tmp_path, env=ENV | {"OTHER": "rows"})
    assert "rank 1 has another number of steps" in (err := finished(other, 1)[1]) or "another dataset" in err
