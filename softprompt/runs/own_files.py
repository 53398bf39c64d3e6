"""The files that runs have written into a folder, recognized by their names and their content.

A manifest lists a run's files. An older version wrote none; its files have content that only a run writes.
"""

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from softprompt.prompt.adapter_io import CHECKPOINT, PROMPT_KEY
from softprompt.prompt.file_names import CARD_FILE, CONFIG_FILE, SETTINGS_FILE, WEIGHTS_FILE
from softprompt.runs.checkpoints import checkpoints
from softprompt.runs.file_names import (
    ANSWERS_FILE,
    CHECKSUMS_FILE,
    ENCODER_FILE,
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
from softprompt.utils.atomic_io import read_inside

OF_A_RUN = (
    *(*sorted(OF_A_CHECKPOINT), ENCODER_FILE, QUESTION_FILE, RESULTS_FILE, PICTURE_FILE, FACTS_FILE, START_FILE),
    *(REPORT_FILE, ANSWERS_FILE),
)
MANIFEST_FILE = "run_manifest.json"
EVENTS_FOLDER, EVENTS = "runs", "events.out.tfevents.*"  # TensorBoard's files, in OUTPUT_DIR/runs as Trainer's
PATTERN = rf"{'|'.join(map(re.escape, OF_A_RUN))}|{CHECKPOINT}|{EVENTS_FOLDER}/events\.out\.tfevents\.[^/]*"
HEAD = 1 << 16  # how many bytes of a file are read to recognize it
OF_A_STATE = {"step", "taken", "scaler", "unlogged", "arguments", "fingerprints"}


def events_in(folder: Path) -> list[str]:
    """Return the names of TensorBoard's event files in a run's folder."""
    return [f"{EVENTS_FOLDER}/{path.name}" for path in (folder / EVENTS_FOLDER).glob(EVENTS)]


def beside(folder: Path) -> set[str]:
    """Return the names of what belongs to a run although its manifest may not list it: the page that `softprompt
    report` wrote about the run, and empty checkpoint folders."""
    return _empty(folder) | ({REPORT_FILE} if _looks_written(folder, REPORT_FILE) else set())


def _empty(folder: Path) -> set[str]:
    """Return the names of empty checkpoint folders, which may be removed."""
    return {path.name for path in checkpoints(folder) if not path.is_symlink() and not any(path.iterdir())}


def of_an_older_version(folder: Path) -> set[str]:
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


def _is_too_new(folder: Path, name: str) -> bool:
    """Versions that wrote no manifest wrote no such file."""
    return False


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
    **dict.fromkeys((ENCODER_FILE, QUESTION_FILE, ANSWERS_FILE), _is_too_new),
    FACTS_FILE: _has("arguments", "base", "prompt"),
    START_FILE: _tensors(PROMPT_KEY),
    REPORT_FILE: _contains(MARK),
}
