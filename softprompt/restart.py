"""torchrun repeats its command after a rank has died. What that means, to go on or to begin, a note in the run's folder
says: which launch the run there is of, and by its own date, since when.

Neither torchrun's count of restarts nor a flag can say it: a node counts only the restarts that it asked for, torchrun
starts again after a refusal as well, when the folder is another run's, and an older run's checkpoints may lie there.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from softprompt.arguments import NEWEST
from softprompt.config import TrainConfig
from softprompt.errors import ConfigError
from softprompt.files import write_files
from softprompt.resume import newest_whole
from softprompt.torchrun import may_restart

NOTE = ".torchrun"


def note(folder: Path, launches: Sequence[str]) -> None:
    """From now on the run in `folder` is that of `launches`, one for each rank's node; a note that shares one with them
    keeps its date."""
    path = folder / NOTE
    since = path.stat().st_mtime_ns if _is_of(path, launches) else None
    write_files(folder, {NOTE: "\n".join(sorted(set(launches))).encode()})
    if since is not None:
        os.utime(path, ns=(since, since))


def has_saved(config: TrainConfig, launches: Sequence[str]) -> bool:
    """Whether the newest checkpoint in the run's folder is one that an earlier start of this same launch has saved."""
    folder = Path(str(config.training.output_dir))
    with suppress(OSError):
        newest = newest_whole(folder) if _is_of(folder / NOTE, launches) else None
        return newest is not None and newest.stat().st_mtime_ns >= (folder / NOTE).stat().st_mtime_ns
    return False


def restarted(config: TrainConfig, goes_on: bool) -> TrainConfig:
    """What the command means now: itself, or to go on with what it has saved.

    Raises:
        ConfigError: torchrun may restart a run whose folder has no name of its own.
    """
    args = config.training
    if args.output_dir is None and may_restart():
        raise ConfigError("torchrun --max-restarts finds a run again by its folder; name it with --output_dir")
    if not goes_on:
        return config
    return replace(config, training=replace(args, resume_from_checkpoint=NEWEST, overwrite_output_dir=False))


def _is_of(path: Path, launches: Sequence[str]) -> bool:
    with suppress(OSError, UnicodeDecodeError):
        return not set(path.read_text(encoding="utf-8").splitlines()).isdisjoint(launches)
    return False
