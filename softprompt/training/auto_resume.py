"""Resume automatically when torchrun restarts a run.

torchrun repeats its command after a rank has died. The newest complete checkpoint in the run's folder decides whether
to start or to resume, because it names the launch and the processes that saved it. torchrun's restart count cannot
decide: each node counts only the restarts that it requested, torchrun also restarts a run that refused to start, and
the folder may hold checkpoints of an older run.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from softprompt.config.loader import TrainConfig
from softprompt.config.train_args import NEWEST
from softprompt.runs.checkpoints import newest_whole
from softprompt.runs.file_names import STATE_FILE
from softprompt.runs.train_state import run_folder
from softprompt.utils.errors import ConfigError
from softprompt.utils.torchrun_env import may_restart


def has_saved(config: TrainConfig, starts: Sequence[Sequence[str]]) -> bool:
    """Whether an earlier attempt of the same launch saved the newest complete checkpoint in the run's folder. `starts`
    are the results of `torchrun_env.launch_ids` on all ranks; empty without torchrun."""
    folder = run_folder(config)
    newest = newest_whole(folder) if starts and folder else None
    if newest is None:
        return False
    with suppress(OSError, LookupError, TypeError):  # the file may hold anything
        saved = json.loads((newest / STATE_FILE).read_text(encoding="utf-8"))["starts"]
        launches, processes = ([{start[what] for start in some} for some in (starts, saved)] for what in (0, 1))
        return not launches[0].isdisjoint(launches[1]) and processes[0].isdisjoint(processes[1])
    return False


def with_auto_resume(config: TrainConfig, goes_on: bool) -> TrainConfig:
    """Return the settings as given, or, if `goes_on`, those that resume the run from its newest checkpoint.

    Raises:
        ConfigError: A run that torchrun may restart has no `--output_dir`.
    """
    args, folder = config.training, run_folder(config)
    if folder is None and may_restart():
        raise ConfigError("torchrun --max-restarts finds a run again by its folder; name it with --output_dir")
    if not goes_on:
        return config
    again = {"output_dir": str(folder), "resume_from_checkpoint": NEWEST, "overwrite_output_dir": False}
    return replace(config, training=replace(args, **again))
