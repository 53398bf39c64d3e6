"""Learning rate schedules: equal to those of transformers, whose import they avoid."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from torch import nn

from softprompt.config.train_args import TrainingArguments
from softprompt.training.lr_schedules import farthest_move, learning_rates

ROOT = Path(__file__).parent.parent.parent
KINDS = get_args(get_type_hints(TrainingArguments)["lr_scheduler_type"])


def of_transformers(kind: str, peak: float, warmup: int, total: int) -> list[float]:
    """The learning rates of a run with Trainer's scheduler."""
    from transformers import get_scheduler

    scheduler = get_scheduler(kind, torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=peak), warmup, total)
    return [peak * scheduler.lr_lambdas[0](step) for step in range(total)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("warmup, steps", [(0, 0), (1, 1), (10, 10), (0.2, 10), (0.01, 1), (50, 50), (60, 60)])
def test_every_schedule_is_that_of_transformers(kind, warmup, steps):
    for peak in (0.3, 5e-5):
        lr_at = learning_rates(TrainingArguments(lr_scheduler_type=kind, warmup_steps=warmup), peak, 50)
        assert [lr_at(step) for step in range(50)] == of_transformers(kind, peak, steps, 50)


def test_a_run_of_one_step_learns():
    for kind in KINDS:
        assert learning_rates(TrainingArguments(lr_scheduler_type=kind), 0.1, 1)(0) == 0.1


def test_the_farthest_move_is_the_sum_of_the_learning_rates():
    lr_at = learning_rates(TrainingArguments(), 0.1, 100)
    assert farthest_move(lr_at, 100) == pytest.approx(sum(map(lr_at, range(100))))
    assert farthest_move(learning_rates(TrainingArguments(), 0.1, 1_000_000), 1_000_000) == pytest.approx(5e4, rel=1e-3)


@pytest.mark.skipif(not (find_spec("peft") and find_spec("bitsandbytes")), reason="needs peft and bitsandbytes")
def test_a_run_and_its_answers_import_neither_peft_nor_bitsandbytes(tmp_path):
    """bitsandbytes warns at its import about a kernel that no run without --load_in_4bit uses."""
    code = """
import sys, softprompt
sys.modules["matplotlib"] = None  # no charts, which take longer than the run
run = softprompt.train(output_dir="run", max_steps=1, per_device_train_batch_size=2, eval_rows=2, dataset="rows.jsonl")
model = softprompt.SoftPromptModel.from_pretrained(adapter="run")
model.generate("好", max_new_tokens=1), model.classify(["好"], ["好", "坏"])
sys.exit(", ".join({"peft", "bitsandbytes", "kernels"} & set(sys.modules)) or None)
"""
    (tmp_path / "rows.jsonl").write_text('{"instruction": "好", "output": "好"}\n' * 4, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "kernels" not in ended.stderr
