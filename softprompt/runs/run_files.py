"""Which files a training run writes into its folder, and which files there it may replace or remove."""

import errno
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from softprompt.prompt.adapter_io import CHECKPOINT, PROMPT_KEY
from softprompt.prompt.file_names import CARD_FILE, CONFIG_FILE, SETTINGS_FILE, WEIGHTS_FILE
from softprompt.runs.checkpoints import checkpoints, step_of, surplus
from softprompt.runs.file_names import (
    CHECKSUMS_FILE,
    FACTS_FILE,
    MARK,
    METRICS_FILE,
    OF_A_CHECKPOINT,
    OPTIMIZER_FILE,
    PICTURE_FILE,
    QUESTION_FILE,
    REPORT_FILE,
    RESULTS_FILE,
    RNG_FILE,
    START_FILE,
    STATE_FILE,
)
from softprompt.runs.manifest import Kind, Manifest
from softprompt.utils.atomic_io import read_inside, remove_leftovers
from softprompt.utils.errors import OutputError

OF_A_RUN = (*sorted(OF_A_CHECKPOINT), QUESTION_FILE, RESULTS_FILE, PICTURE_FILE, FACTS_FILE, START_FILE, REPORT_FILE)
MANIFEST_FILE = "run_manifest.json"
EVENTS_FOLDER, EVENTS = "runs", "events.out.tfevents.*"  # TensorBoard's files, in OUTPUT_DIR/runs as Trainer's
PATTERN = rf"{'|'.join(map(re.escape, OF_A_RUN))}|{CHECKPOINT}|{EVENTS_FOLDER}/events\.out\.tfevents\.[^/]*"
HEAD = 1 << 16  # how many bytes of a file are read to recognize it
OF_A_STATE = {"step", "taken", "scaler", "unlogged", "arguments", "fingerprints"}


def run_files(folder: Path) -> Manifest:
    """Return the manifest of a run's folder."""
    return Manifest(folder, Kind("run of train.py", MANIFEST_FILE, PATTERN, _of_an_older_version, _beside))


def refuse_other_run(folder: Path, overwrite: bool) -> None:
    """Raise OutputError if `folder` holds a run and `overwrite` is not given."""
    saved = rf"{re.escape(CONFIG_FILE)}|{CHECKPOINT}"
    if not overwrite and any(re.fullmatch(saved, name) for name in run_files(folder).names()):
        raise OutputError(
            f"--output_dir {folder} holds a run already; go on with it (--resume_from_checkpoint), start anew "
            "over it (--overwrite_output_dir), or name another folder"
        )


def refuse_foreign_files(folder: Path, board: bool, after_step: int | None = None) -> None:
    """Check that no file in `folder` that a run would replace or remove was written by something else.

    Args:
        board: whether the run writes TensorBoard's event files.
        after_step: the step after which the run in `folder` is resumed; None for a new run.

    Raises:
        OutputError: a file that the run would write, a checkpoint that it would replace, or a file in such a checkpoint
            was written by something else.
    """
    manifest = run_files(folder)
    later = [path for path in folder.glob("checkpoint-*") if re.fullmatch(CHECKPOINT, path.name)]
    later = [path for path in later if after_step is None or step_of(path) > after_step]
    foreign = manifest.foreign([*OF_A_RUN, *(path.name for path in later), *(events_in(folder) if board else ())])
    foreign += [name for path in later if path.name not in foreign for name in foreign_in(path)]
    manifest.refuse(foreign)


def remove_run(folder: Path) -> None:
    """Remove the files of the run in `folder`. A checkpoint that holds a file of something else is kept."""
    manifest = run_files(folder)
    manifest.remove(name for name in manifest.names() if not foreign_in(folder / name))


def own_checkpoint(folder: Path, step: int) -> Path:
    """List checkpoint-`step` in the manifest, and return its folder, which the caller writes.

    Raises:
        FileExistsError: the folder exists and is not the run's own, or it holds a file that no checkpoint has.
    """
    path = folder / f"checkpoint-{step}"
    run_files(folder).add([path.name])
    for name in foreign_in(path):
        raise FileExistsError(errno.EEXIST, "is not of this run, and would be replaced", str(folder / name))
    return path


def tidy(folder: Path) -> None:
    """Remove the temporary files that a killed process has left in `folder`."""
    remove_leftovers(folder, CHECKPOINT, (*OF_A_RUN, MANIFEST_FILE))


def remove_old_checkpoints(folder: Path, newest: int, limit: int | None, best: int | None = None) -> list[str]:
    """Remove the checkpoints that `checkpoints.surplus` names, after checkpoint-`newest` was written. A checkpoint that
    holds a file of something else is kept. Return the names of these files."""
    manifest = run_files(folder)
    owned = manifest.names()
    numbers = [step_of(path) for path in checkpoints(folder) if path.name in owned]
    old = [f"checkpoint-{number}" for number in surplus(numbers, newest, limit, best)]
    foreign = {name: foreign_in(folder / name) for name in old}
    manifest.remove(name for name in old if not foreign[name])
    return [name for names in foreign.values() for name in names]


def foreign_in(path: Path) -> list[str]:
    """Return the names, as checkpoint-N/NAME, of the files in a checkpoint-N folder that a run does not write. Return
    an empty list if `path` is no folder."""
    if not path.is_dir():
        return []
    return [f"{path.name}/{p.name}" for p in path.iterdir() if p.name not in (*OF_A_CHECKPOINT, CHECKSUMS_FILE)]


def events_in(folder: Path) -> list[str]:
    """Return the names of TensorBoard's event files in a run's folder."""
    return [f"{EVENTS_FOLDER}/{path.name}" for path in (folder / EVENTS_FOLDER).glob(EVENTS)]


def _beside(folder: Path) -> set[str]:
    """Return the name of the page that `softprompt report` wrote about the run, and those of empty checkpoint
    folders."""
    return _empty(folder) | ({REPORT_FILE} if _looks_written(folder, REPORT_FILE) else set())


def _empty(folder: Path) -> set[str]:
    """Return the names of empty checkpoint folders, which may be removed."""
    return {path.name for path in checkpoints(folder) if not path.is_symlink() and not any(path.iterdir())}


def _of_an_older_version(folder: Path) -> set[str]:
    """Return the names of the files of a run of an older version, which wrote no manifest. Each file is recognized by
    content that only a run writes; doubtful files are left out."""
    of_steps = {path.name for path in checkpoints(folder) if not path.is_symlink() and _is_checkpoint(path)}
    if not of_steps and not any(_looks_written(folder, name) for name in (STATE_FILE, FACTS_FILE)):
        return _empty(folder)
    boards = [_json(folder, name).get("arguments") for name in (STATE_FILE, FACTS_FILE)]
    board = any(isinstance(a, dict) and a.get("report_to") == "tensorboard" for a in boards)
    files = {name for name in OF_A_RUN if _looks_written(folder, name)}
    return _empty(folder) | of_steps | files | (set(events_in(folder)) if board else set())


def _is_checkpoint(path: Path) -> bool:
    return _json(path, CHECKSUMS_FILE).keys() >= OF_A_CHECKPOINT or _looks_written(path, STATE_FILE)


def _looks_written(folder: Path, name: str) -> bool:
    """Whether a file's content looks like what a run writes under this name."""
    return not (folder / name).is_symlink() and (folder / name).is_file() and LOOKS[name](folder, name)


def _has(*keys: str) -> Callable[[Path, str], bool]:
    return lambda folder, name: _json(folder, name).keys() >= set(keys)


def _contains(text: str) -> Callable[[Path, str], bool]:
    return lambda folder, name: text.encode() in _head(folder / name)


def _tensors(*names: str) -> Callable[[Path, str], bool]:
    """Return a test of whether a safetensors file, judged by its header, holds no other tensors than `names`."""

    def looks(folder: Path, name: str) -> bool:
        head = _head(folder / name)
        try:
            (size,) = struct.unpack("<Q", head[:8])
            return json.loads(head[8 : 8 + size]).keys() - {"__metadata__"} <= set(names)
        except (struct.error, ValueError, AttributeError, RecursionError):
            return False

    return looks


def _is_log(folder: Path, name: str) -> bool:
    try:
        line = _head(folder / name).split(b"\n")[0]
        return not line or json.loads(line).keys() >= {"step", "epoch"}
    except (ValueError, AttributeError, RecursionError):
        return False


def _json(folder: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads(read_inside(folder, name, 256 << 20))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _head(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(HEAD)
    except OSError:
        return b""


LOOKS: dict[str, Callable[[Path, str], bool]] = {
    CONFIG_FILE: lambda folder, name: _json(folder, name).get("peft_type") == "PROMPT_TUNING",
    WEIGHTS_FILE: _tensors(PROMPT_KEY),
    SETTINGS_FILE: _has("template", "generation"),
    CARD_FILE: _contains("learned with softprompt"),
    METRICS_FILE: _is_log,
    OPTIMIZER_FILE: _tensors("exp_avg", "exp_avg_sq", "step"),
    RNG_FILE: _tensors("cpu", "cuda"),
    STATE_FILE: _has(*OF_A_STATE),
    RESULTS_FILE: _has("epoch", "train_runtime", "train_tokens_per_second"),
    PICTURE_FILE: _contains("Matplotlib"),
    QUESTION_FILE: lambda folder, name: False,  # versions that wrote no manifest wrote no such file
    FACTS_FILE: _has("arguments", "base", "prompt"),
    START_FILE: _tensors(PROMPT_KEY),
    REPORT_FILE: _contains(MARK),
}
