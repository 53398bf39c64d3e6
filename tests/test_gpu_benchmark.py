"""benchmarks/gpu.py, which is for a GPU, at toy size on the CPU: every section ends well."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).parents[1]


@pytest.mark.slow
def test_every_section_runs_at_toy_size(tmp_path):
    output = tmp_path / "gpu.md"
    command = [
        sys.executable,
        "benchmarks/gpu.py",
        "--device",
        "cpu",
        "--toy",
        "--minutes",
        "30",
        "--output",
        str(output),
    ]
    done = subprocess.run([*command, "--minutes", "30"], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = output.read_text()
    assert text.count("\n## ") == 8 and text.count("\nDone after ") == 8, text


def test_a_section_at_its_limit_keeps_what_it_printed_and_lets_the_next_one_run(tmp_path):
    output = tmp_path / "gpu.md"
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--toy", "--output", str(output)]
    command += ["--sections", "rates", "doctor", "--minutes", "0.05"]
    subprocess.run(command, cwd=PROJECT, capture_output=True, check=True)
    text = output.read_text()
    assert "Ended at its limit" in text and "Not run" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_the_default_is_refused(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "--output", str(tmp_path / "gpu.md")]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 2 and "--device cpu --toy" in done.stderr and not list(tmp_path.iterdir())
