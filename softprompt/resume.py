"""Going on where a run stopped: the loop's state in files, and checkpoints that are whole or recognised as broken. What
checkpoint and command line each have to say is in resume_config.py.

optimizer.safetensors   AdamW's moments [P, H] fp32 and step count
rng_state.safetensors   states of torch's random generators, uint8
trainer_state.json      position, schedule, scaler, what is not yet logged, totals, best, settings, fingerprints
metrics.jsonl           every metric so far
checksums.json          sha256 of every other file of the checkpoint
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

from softprompt.arguments import NEWEST
from softprompt.checkpoint import CARD_FILE, CONFIG_FILE, SETTINGS_FILE, WEIGHTS_FILE, checkpoints, json_bytes
from softprompt.commands import TRAIN, flag, script
from softprompt.config import TrainConfig
from softprompt.errors import CheckpointError, ConfigError
from softprompt.files import Files, read_inside
from softprompt.torchrun import launched
from softprompt.trainer import Metrics, Step, TrainingState

STATE_FILE = "trainer_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
RNG_FILE = "rng_state.safetensors"
METRICS_FILE = "metrics.jsonl"
CHECKSUMS_FILE = "checksums.json"
STATE_FILES = (OPTIMIZER_FILE, RNG_FILE, STATE_FILE)
OF_A_CHECKPOINT = {WEIGHTS_FILE, CONFIG_FILE, SETTINGS_FILE, CARD_FILE, METRICS_FILE, *STATE_FILES}
MAX_FILE_BYTES = 32 << 30  # of a checkpoint; only lest a link to an endless file is read
OF_THE_RUN = ("arguments", "fingerprints", "totals", "engine", "best", "rows_per_step")
OF_THIS_CALL = (
    *("max_time", "resume_from_checkpoint", "ignore_data_skip", "overwrite_output_dir", "dry_run", "print_model"),
    "hub_token",
)


def state_files(state: TrainingState, more: Mapping[str, Any]) -> dict[str, bytes]:
    """The loop's state, and `more` that is JSON-able, as STATE_FILES."""
    values = {
        "step": state.step,
        "taken": state.taken,
        "scaler": state.scaler,
        "unlogged": [asdict(step) for step in state.unlogged],
        "position": dict(state.position),
        **more,
    }
    tensors = {name: value.cpu().contiguous() for name, value in state.optimizer.items()}
    return {OPTIMIZER_FILE: save(tensors), RNG_FILE: save(dict(state.rng)), STATE_FILE: json_bytes(values)}


def metrics_file(history: Sequence[Metrics]) -> bytes:
    """metrics.jsonl: a record a line."""
    return "".join(json.dumps(record, allow_nan=False) + "\n" for record in history).encode()


def with_checksums(files: Files) -> dict[str, bytes]:
    """The files and their checksums."""
    return {**files, CHECKSUMS_FILE: json_bytes({name: _sha256(content) for name, content in sorted(files.items())})}


def fault_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint-N folder; None if it is whole: every file as it was written, none too few, and of
    the step that its name says."""
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
    """The newest checkpoint of a run that is whole; each that is newer and is not is told."""
    for checkpoint in reversed(checkpoints(output_dir)):
        if not (fault := fault_of(checkpoint)):
            return checkpoint
        tell(f"{checkpoint}: {fault}; the one before is tried")
    return None


def way_on(output_dir: Path, more: str = "") -> str:
    """Where a run that broke off stands, and how it goes on: a clause for its last message; `more` ends the command."""
    found = newest_whole(output_dir)
    if found is None:
        return "there is no checkpoint yet"
    return f"{found} is whole; go on with: {resume_command(output_dir)}{more}"


def resume_command(output_dir: Path) -> str:
    """What goes on with a run, started as this process was: alone, or by torchrun, on as many nodes."""
    local, size = (os.environ.get(name, "1") for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    nodes = f" --nnodes={int(size) // int(local)} …" if size != local else ""
    program = f"torchrun --nproc_per_node={local}{nodes}" if launched() else "python"
    folder = str(output_dir) if str(output_dir) != NEWEST else os.path.join(".", NEWEST)
    return f"{program} {script(TRAIN)}{flag('resume_from_checkpoint', folder)}"


def find_checkpoint(config: TrainConfig, say: Callable[[str], None]) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means, or None: it was not given, or there is none yet.

    A checkpoint-N folder is that one; a run's folder, or no value with --output_dir, the newest whole one in it.

    Raises:
        ConfigError: no value, and no --output_dir either.
        CheckpointError: the folder named is no whole checkpoint, or none of a run's is whole.
    """
    named = config.training.resume_from_checkpoint
    if named is None:
        return None
    if named == NEWEST and config.training.output_dir is None:
        raise ConfigError("--resume_from_checkpoint without a folder goes on with --output_dir; name that, or a folder")
    folder = Path(str(config.training.output_dir if named == NEWEST else named))
    if (folder / STATE_FILE).exists() and not checkpoints(folder):
        if fault := fault_of(folder):
            raise CheckpointError(f"--resume_from_checkpoint {folder}: {fault}; take an earlier checkpoint")
        return folder
    if found := newest_whole(folder, say):
        return found
    if checkpoints(folder):
        raise CheckpointError(f"no checkpoint in {folder} is whole; start anew with --overwrite_output_dir")
    if named != NEWEST:
        raise CheckpointError(f"--resume_from_checkpoint {folder}: no checkpoint there; name a run or a checkpoint-N")
    say(f"no checkpoint in {folder} yet: starting at step 0")
    return None


def run_folder(config: TrainConfig) -> Path | None:
    """The folder that a run will be written to, as far as its settings name it: --output_dir, else the folder of the
    run that is resumed."""
    named = config.training.resume_from_checkpoint
    if config.training.output_dir is not None:
        return Path(config.training.output_dir)
    if named in (None, NEWEST):
        return None
    folder = Path(str(named))
    return folder.parent if (folder / STATE_FILE).exists() and not checkpoints(folder) else folder


def load_state(checkpoint: Path) -> tuple[TrainingState, dict[str, Any]]:
    """The loop's state and all else that a whole checkpoint holds: what trainer_state.json has, and the `history`.

    Raises:
        CheckpointError: it was written by another version and lacks what this one needs.
    """
    files = {name: (checkpoint / name).read_bytes() for name in (*STATE_FILES, METRICS_FILE)}
    values = json.loads(files[STATE_FILE])
    try:
        state = TrainingState(
            values["step"],
            values["taken"],
            [Step(**step) for step in values["unlogged"]],
            load(files[OPTIMIZER_FILE]),
            values["scaler"],
            load(files[RNG_FILE]),
            values.get("position", {}),
        )
        saved = {name: values[name] for name in OF_THE_RUN}
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint / STATE_FILE}: not a training state of this version ({error})") from None
    return state, {**saved, "history": [json.loads(line) for line in files[METRICS_FILE].splitlines()]}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
