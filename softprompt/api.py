"""The Python interface: train a prompt with one call, load it with its base, and generate.

run = softprompt.train(dataset="rows.jsonl", output_dir="runs/my-run")
model = softprompt.SoftPromptModel.from_pretrained(adapter="runs/my-run")
model.generate("…")
"""

import sys
from typing import Any

from softprompt.config.documentation import documented
from softprompt.config.loader import GROUPS, PRESETS, TrainConfig, train_config
from softprompt.distributed.process_group import World
from softprompt.generation.model import SoftPromptModel
from softprompt.report.after_training import ReportAndPush
from softprompt.training.result import Run
from softprompt.training.run import run_training
from softprompt.utils.errors import Stopped
from softprompt.utils.std_streams import is_interactive, tolerant_streams
from softprompt.utils.translation import translate

__all__ = ["SoftPromptModel", "run_and_report", "train"]


@documented(GROUPS, PRESETS)
def train(preset: str | None = None, **settings: Any) -> Run:
    """Learn a soft prompt as `python train.py` does, for example train(dataset="rows.jsonl", eval_rows=100).

    Ctrl-C, or Jupyter's button to interrupt the kernel, stops the run after the current step and saves it; so does the
    end of `max_time`. In an interactive session (Python's prompt, IPython, Jupyter), the run as it was saved is then
    returned: `run.stopped` says how to continue it, and `run.model()` answers with its prompt. In a script, Stopped is
    raised, whose `run` is the same, so that no later line takes the run for a finished one. A second interrupt stops at
    once; what was saved before is kept.

    Args:
        preset: Settings to start from, as --preset: by default mini, or none if `model_name_or_path` is given.
        settings: Flags of train.py as keyword arguments; all of them are listed below.

    Returns:
        The run: its folder `output_dir`, its `metrics`, the `history` of its metrics over the steps, `plot()`, and
        `model()`, which answers with its prompt.

    Raises:
        Stopped: The run was stopped before its last step, and the session is not interactive.
        SoftpromptError: The settings, the data, the base or the output folder prevent the run.
    """
    with tolerant_streams():
        try:
            run = run_and_report(train_config(preset, **settings))
        except Stopped as stop:
            if stop.run is None or not is_interactive():
                raise
            print(translate(str(stop)))
            return stop.run
        if run.not_pushed:
            print(f"warning: {run.not_pushed}", file=sys.stderr)
    return run


def run_and_report(config: TrainConfig, world: World | None = None) -> Run:
    """Train as `config` says, write the run's report, and, with `push_to_hub`, upload the run; see `training.run`."""
    return run_training(config, world, ReportAndPush())
