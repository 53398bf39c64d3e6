"""The Python interface: train a prompt with one call, load it with its base, and generate.

run = softprompt.train(dataset="rows.jsonl", output_dir="runs/my-run")
model = softprompt.SoftPromptModel.from_pretrained(adapter="runs/my-run")
model.generate("…")
"""

import sys
from typing import Any

from softprompt.config.loader import TrainConfig, train_config
from softprompt.distributed.process_group import World
from softprompt.generation.model import SoftPromptModel
from softprompt.report.after_training import ReportAndPush
from softprompt.training.result import Run
from softprompt.training.run import run_training
from softprompt.utils.std_streams import tolerant_streams

__all__ = ["SoftPromptModel", "run_and_report", "train"]


def train(preset: str | None = None, **settings: Any) -> Run:
    """Learn a soft prompt as `python train.py` does, for example train(dataset="rows.jsonl", eval_rows=100).

    Args:
        preset: Defaults to start from, as --preset.
        settings: Flags of train.py as keyword arguments.

    Returns:
        The finished run: its folder, metrics and evaluations.

    Raises:
        SoftpromptError: The settings, the data, the base or the output folder prevent the run.
    """
    with tolerant_streams():
        run = run_and_report(train_config(preset, **settings))
        if run.not_pushed:
            print(f"warning: {run.not_pushed}", file=sys.stderr)
    return run


def run_and_report(config: TrainConfig, world: World | None = None) -> Run:
    """Train as `config` says, write the run's report, and, with `push_to_hub`, upload the run; see `training.run`."""
    return run_training(config, world, ReportAndPush())
