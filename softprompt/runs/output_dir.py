"""Choose a run's output folder and take its lock."""

import itertools
import re
import time
from collections.abc import Iterator
from pathlib import Path

from softprompt.config.data_args import is_mini_task
from softprompt.config.loader import TrainConfig
from softprompt.config.train_args import RUNS
from softprompt.data.readers import READERS
from softprompt.runs.checkpoints import step_of
from softprompt.runs.run_files import refuse_foreign_files, refuse_other_run
from softprompt.utils.atomic_io import check_writable
from softprompt.utils.errors import OutputError
from softprompt.utils.file_lock import FolderLock
from softprompt.utils.torchrun_env import is_main

MAX_NAME = 40  # characters of a base's or a dataset's name in the name of a folder


def choose_output_dir(config: TrainConfig, checkpoint: Path | None) -> Path:
    """Return the output folder of a run; it is not created yet.

    Raises:
        OutputError: The folder is a file, cannot be written to, holds another run than that of `checkpoint`, holds
            files of something else that the run would replace, or is in use by another process.
    """
    if config.training.output_dir is not None:
        path = Path(config.training.output_dir)
        check_writable(path, "--output_dir")
        _refuse_others(config, path, checkpoint)
        return path
    stem = f"{_default_name(config)}-{time.strftime('%Y%m%d-%H%M%S')}"
    check_writable(RUNS / stem, "the default output_dir")
    return next(path for path in _numbered(RUNS / stem) if not path.exists())


def _default_name(config: TrainConfig) -> str:
    """Return a name that says which base and which rows a run has, such as mini-sentiment or bloom-1b4-zh-alpaca-zh."""
    dataset = str(config.data.dataset or config.distillation.text)
    rows = Path(dataset.partition(":")[2] if is_mini_task(dataset) else dataset).resolve()
    rows_name = rows.stem if rows.suffix.lower() in READERS else rows.name
    base_name = config.preset or Path(str(config.model.model_name_or_path)).name
    return f"{_short(base_name)}-{_short(rows_name)}"


def _short(name: str) -> str:
    """Return the beginning of a name, in which other characters than letters, digits, dots and underscores are
    hyphens."""
    return re.sub(r"[^\w.]+", "-", name)[:MAX_NAME].strip("-.") or "unnamed"


def claim_output_dir(config: TrainConfig, output_dir: Path, checkpoint: Path | None) -> FolderLock:
    """Create the output folder and take its lock. If its name is the default one and another process has created a
    folder of that name in the meantime, use the next free name.

    Raises:
        OutputError: The folder cannot be created, or another process is writing into it or has written a run into it in
            the meantime.
    """
    try:
        if config.training.output_dir is None:
            output_dir = next(path for path in _numbered(output_dir) if _made(path))
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(output_dir)
        lock.take()
    except OSError as error:
        raise OutputError(
            f"--output_dir {output_dir}: cannot be created ({error.strerror}); name another folder"
        ) from None
    try:
        if config.training.output_dir is not None:
            _refuse_others(config, output_dir, checkpoint, locked=True)
    except OutputError:
        lock.release()
        raise
    return lock


def continues_in(output_dir: Path, checkpoint: Path | None) -> bool:
    """Whether `output_dir` holds the run that `checkpoint` belongs to, so that the run is continued there."""
    here = output_dir.resolve()
    return checkpoint is not None and here in (checkpoint.parent.resolve(), checkpoint.resolve().parent)


def _refuse_others(config: TrainConfig, path: Path, checkpoint: Path | None, locked: bool = False) -> None:
    if not locked and is_main():
        FolderLock(path).refuse_if_held()
    goes_on = continues_in(path, checkpoint)
    if not goes_on:
        refuse_other_run(path, config.training.overwrite_output_dir)
    board = config.sharing.report_to == "tensorboard"
    refuse_foreign_files(path, board, step_of(checkpoint) if checkpoint and goes_on else None)


def _numbered(path: Path) -> Iterator[Path]:
    return (path if n == 1 else path.with_name(f"{path.name}-{n}") for n in itertools.count(1))


def _made(path: Path) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir()
    except FileExistsError:
        return False
    return True
