"""A run's checkpoint-N folders: write them with checksums, verify them, find the newest whole one, remove old ones."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from softprompt.prompt.adapter_io import CHECKPOINT, json_bytes
from softprompt.runs.file_names import (
    CHECKSUMS_FILE,
    ENCODER_FILE,
    OF_A_CHECKPOINT,
    OPTIMIZER_FILE,
    RNG_FILE,
    STATE_FILE,
    STATE_FILES,
)
from softprompt.runs.state import Metrics, TrainingState
from softprompt.utils.atomic_io import Files, read_inside

MAX_FILE_BYTES = 32 << 30  # the largest file of a checkpoint; a limit for links to endless files such as /dev/zero


def checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoint-N folders of a run, by ascending N."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(CHECKPOINT, path.name)]
    return sorted((path for path in found if path.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the N of checkpoint-N."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def surplus(numbers: Sequence[int], newest: int, limit: int | None, best: int | None = None) -> list[int]:
    """Return the steps of the checkpoints to remove after checkpoint-`newest` was written.

    These are the checkpoints of later steps, which are left from before the run was resumed at an earlier step, and the
    oldest ones of those that exceed `limit` (None: no limit). checkpoint-`newest` and checkpoint-`best` are kept.

    Args:
        numbers: The steps of all checkpoints, ascending.
    """
    old = [n for n in numbers if n <= newest]
    above = len(old) - limit if limit else 0
    spare = [n for n in old if n not in (newest, best)]
    return [n for n in numbers if n > newest] + spare[: max(0, above)]


def state_files(state: TrainingState, more: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the content of STATE_FILES and, if there is an encoder, ENCODER_FILE, which hold the state of the loop;
    `more` values, which must be serializable as JSON, are added to trainer_state.json."""
    values = {
        "step": state.step,
        "taken": state.taken,
        "scaler": state.scaler,
        "unlogged": [asdict(step) for step in state.unlogged],
        "position": dict(state.position),
        **more,
    }
    return {
        OPTIMIZER_FILE: _serialized(state.optimizer),
        RNG_FILE: save(dict(state.rng)),
        STATE_FILE: json_bytes(values),
        **({ENCODER_FILE: _serialized(state.encoder)} if state.encoder else {}),
    }


def read_state_files(checkpoint: Path) -> dict[str, bytes]:
    """Return the files of a whole checkpoint that `state_files` has made."""
    encoder = [ENCODER_FILE] if (checkpoint / ENCODER_FILE).exists() else []
    return {name: (checkpoint / name).read_bytes() for name in (*STATE_FILES, *encoder)}


def metrics_file(history: Sequence[Metrics]) -> bytes:
    """Return the content of metrics.jsonl: one record per line."""
    return "".join(json.dumps(record, allow_nan=False) + "\n" for record in history).encode()


def with_checksums(files: Files) -> dict[str, bytes]:
    """Return the files together with checksums.json."""
    return {**files, CHECKSUMS_FILE: json_bytes({name: _sha256(content) for name, content in sorted(files.items())})}


def fault_of(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint-N folder; None if it is whole. It is whole if every file exists with the
    content that was written, and the state is that of step N."""
    name = CHECKSUMS_FILE
    try:
        text = read_inside(checkpoint, name, MAX_FILE_BYTES)
        sums = json.loads(text)
        if text != json_bytes(sums) or not sums.keys() >= OF_A_CHECKPOINT:
            return f"{name} is not as it was written"
        for name, expected in sums.items():
            if _sha256(read_inside(checkpoint, Path(name).name, MAX_FILE_BYTES)) != expected:
                return f"{name} is not as it was written"
        step = json.loads(read_inside(checkpoint, STATE_FILE, MAX_FILE_BYTES))["step"]
    except FileNotFoundError:
        return f"{Path(name).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{name} cannot be read ({type(error).__name__})"
    return None if checkpoint.name == f"checkpoint-{step}" else f"it is of step {step}"


def newest_whole(output_dir: Path, tell: Callable[[str], object] = lambda fault: None) -> Path | None:
    """Return the newest complete checkpoint of a run; `tell` is called for each newer one that is not whole."""
    for checkpoint in reversed(checkpoints(output_dir)):
        if not (fault := fault_of(checkpoint)):
            return checkpoint
        tell(f"{checkpoint}: {fault}; trying the checkpoint before it")
    return None


def _serialized(tensors: Mapping[str, Tensor]) -> bytes:
    return save({name: value.cpu().contiguous() for name, value in tensors.items()})


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
