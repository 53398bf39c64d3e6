"""Which files a training run writes into its folder, and which files there it may replace or remove."""

import errno
import re
from pathlib import Path

from softprompt.prompt.adapter_io import CHECKPOINT
from softprompt.prompt.file_names import CONFIG_FILE
from softprompt.runs.checkpoints import checkpoints, step_of, surplus
from softprompt.runs.file_names import CHECKSUMS_FILE, ENCODER_FILE, OF_A_CHECKPOINT
from softprompt.runs.manifest import Manifest
from softprompt.runs.own_files import MANIFEST_FILE, OF_A_RUN, events_in
from softprompt.utils.atomic_io import remove_leftovers
from softprompt.utils.errors import OutputError


def refuse_other_run(folder: Path, overwrite: bool) -> None:
    """Raise OutputError if `folder` holds a run and `overwrite` is not given."""
    saved = rf"{re.escape(CONFIG_FILE)}|{CHECKPOINT}"
    if not overwrite and any(re.fullmatch(saved, name) for name in Manifest(folder).names()):
        raise OutputError(
            f"--output_dir {folder} holds a run already; continue it (--resume_from_checkpoint), replace it "
            "(--overwrite_output_dir), or name another folder"
        )


def refuse_foreign_files(folder: Path, board: bool, after_step: int | None = None) -> None:
    """Check that no file in `folder` that a run would replace or remove was written by something else.

    Args:
        board: Whether the run writes TensorBoard's event files.
        after_step: The step after which the run in `folder` is resumed; None for a new run.

    Raises:
        OutputError: A file that the run would write, a checkpoint that it would replace, or a file in such a checkpoint
            was written by something else.
    """
    manifest = Manifest(folder)
    later = [path for path in folder.glob("checkpoint-*") if re.fullmatch(CHECKPOINT, path.name)]
    later = [path for path in later if after_step is None or step_of(path) > after_step]
    foreign = manifest.foreign([*OF_A_RUN, *(path.name for path in later), *(events_in(folder) if board else ())])
    foreign += [name for path in later if path.name not in foreign for name in foreign_in(path)]
    manifest.refuse(foreign)


def remove_run(folder: Path) -> None:
    """Remove the files of the run in `folder`. A checkpoint that holds a file of something else is kept."""
    manifest = Manifest(folder)
    manifest.remove(name for name in manifest.names() if not foreign_in(folder / name))


def own_checkpoint(folder: Path, step: int) -> Path:
    """List checkpoint-`step` in the manifest, and return its folder, which the caller writes.

    Raises:
        FileExistsError: The folder exists and is not the run's own, or it holds a file that no checkpoint has.
    """
    path = folder / f"checkpoint-{step}"
    Manifest(folder).add([path.name])
    for name in foreign_in(path):
        raise FileExistsError(errno.EEXIST, "does not belong to this run, and would be replaced", str(folder / name))
    return path


def tidy(folder: Path) -> None:
    """Remove the temporary files that a killed process has left in `folder`."""
    remove_leftovers(folder, CHECKPOINT, (*OF_A_RUN, MANIFEST_FILE))


def remove_old_checkpoints(folder: Path, newest: int, limit: int | None, best: int | None = None) -> list[str]:
    """Remove the checkpoints that `checkpoints.surplus` names, after checkpoint-`newest` was written. A checkpoint that
    holds a file of something else is kept. Return the names of these files."""
    manifest = Manifest(folder)
    owned = manifest.names()
    numbers = [step_of(path) for path in checkpoints(folder) if path.name in owned]
    old = [f"checkpoint-{number}" for number in surplus(numbers, newest, limit, best)]
    foreign = {name: foreign_in(folder / name) for name in old}
    manifest.remove(name for name in old if not foreign[name])
    return [name for names in foreign.values() for name in names]


def foreign_in(path: Path) -> list[str]:
    """Return the names, as checkpoint-N/NAME, of the files in a checkpoint-N folder that a run does not write. Return
    an empty list if `path` is not a folder."""
    if not path.is_dir():
        return []
    ours = (*OF_A_CHECKPOINT, ENCODER_FILE, CHECKSUMS_FILE)
    return [f"{path.name}/{p.name}" for p in path.iterdir() if p.name not in ours]
