"""Going on where a run stopped: the loop's state in files, checkpoints that are whole or recognised as broken, and what
the checkpoint and the command line each have to say.

optimizer.safetensors   AdamW's moments [P, H] fp32 and step count
trainer_state.json      position, schedule, scaler, what is not yet logged, totals, settings, fingerprints
checksums.json          sha256 of every other file of the checkpoint
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import nn

from softprompt.checkpoint import MAX_JSON_BYTES, checkpoints, json_bytes
from softprompt.config import NEWEST, TrainConfig, train_config
from softprompt.errors import CheckpointError, ConfigError
from softprompt.files import Files
from softprompt.rows import Row
from softprompt.trainer import Step, TrainingState

STATE_FILE = "trainer_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
CHECKSUMS_FILE = "checksums.json"
WHOLE_HASH_BYTES = 4 << 30  # larger bases are sampled
OF_THE_PROMPT = ("num_virtual_tokens", "prompt_tuning_init", "prompt_tuning_init_text", "init_adapter")
OF_THIS_CALL = (
    *("max_time", "resume_from_checkpoint", "ignore_data_skip", "overwrite_output_dir", "dry_run", "print_model"),
)


def state_files(state: TrainingState, more: Mapping[str, Any]) -> dict[str, bytes]:
    """The loop's state, and `more` that is JSON-able, as the two files of a checkpoint."""
    values = {
        "step": state.step,
        "taken": state.taken,
        "scaler": state.scaler,
        "unlogged": [asdict(step) for step in state.unlogged],
        **more,
    }
    tensors = {name: value.cpu().contiguous() for name, value in state.optimizer.items()}
    return {OPTIMIZER_FILE: save(tensors), STATE_FILE: json_bytes(values)}


def with_checksums(files: Files) -> dict[str, bytes]:
    """The files and their checksums."""
    return {**files, CHECKSUMS_FILE: json_bytes({name: _sha256(content) for name, content in sorted(files.items())})}


def fault_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint-N folder; None if it is whole: every file as it was written, none too few, and of
    the step that its name says."""
    try:
        text = (checkpoint / CHECKSUMS_FILE).read_bytes()
        sums = json.loads(text)
        if text != json_bytes(sums):
            return f"{CHECKSUMS_FILE} is not as it was written"
        for name, expected in sums.items():
            if _sha256((checkpoint / Path(name).name).read_bytes()) != expected:
                return f"{name} is not as it was written"
        step = json.loads((checkpoint / STATE_FILE).read_bytes())["step"]
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"cannot be read ({type(error).__name__})"
    return None if checkpoint.name == f"checkpoint-{step}" else f"it is of step {step}"


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
    for checkpoint in reversed(checkpoints(folder)):
        if not (fault := fault_of(checkpoint)):
            return checkpoint
        say(f"{checkpoint}: {fault}; the one before is tried")
    if checkpoints(folder):
        raise CheckpointError(f"no checkpoint in {folder} is whole; start anew with --overwrite_output_dir")
    if named != NEWEST:
        raise CheckpointError(f"--resume_from_checkpoint {folder}: no checkpoint there; name a run or a checkpoint-N")
    say(f"no checkpoint in {folder} yet: starting at step 0")
    return None


def load_state(checkpoint: Path) -> tuple[TrainingState, dict[str, Any]]:
    """The loop's state and all else that trainer_state.json of a whole checkpoint holds.

    Raises:
        CheckpointError: it was written by another version and lacks what this one needs.
    """
    path = checkpoint / STATE_FILE
    if path.stat().st_size > 16 * MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: too large to be a training state")
    values = json.loads(path.read_text(encoding="utf-8"))
    try:
        state = TrainingState(
            values["step"],
            values["taken"],
            [Step(**step) for step in values["unlogged"]],
            load((checkpoint / OPTIMIZER_FILE).read_bytes()),
            values["scaler"],
        )
        return state, {name: values[name] for name in ("arguments", "fingerprints", "totals", "engine")}
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a training state of this version ({error})") from None


def merged(config: TrainConfig, checkpoint: Path, state: Mapping[str, Any], say: Callable[[str], None]) -> TrainConfig:
    """The settings of the resumed run: the checkpoint's, and over them those given now, but for what makes the prompt;
    every difference is told with the value that wins."""
    saved, cut = state["arguments"], state["engine"]
    given = {name: value for name, value in config.given.items() if name not in OF_THE_PROMPT}
    for name, value in config.given.items():
        if name not in OF_THIS_CALL and value != saved.get(name):
            wins = "the checkpoint's wins" if name in OF_THE_PROMPT else "the new one wins"
            say(f"--{name}: {saved.get(name)} in {checkpoint.name}, {value} now: {wins}")
    given.setdefault("output_dir", str(checkpoint.parent))
    old = {name: value for name, value in saved.items() if name not in (*OF_THIS_CALL, "preset")}
    if given.get("engine", saved.get("engine")) == saved.get("engine"):
        old |= cut  # also where memory ran out and made it finer
    else:
        old.pop("tokens_per_microbatch", None)
    return train_config(saved.get("preset"), **{**old, **given})


def check_fingerprints(saved: Mapping[str, str], now: Mapping[str, str], checkpoint: Path) -> None:
    """Raises CheckpointError where the run would go on with another base, tokenizer or dataset."""
    if others := [what for what in now if saved.get(what) != now[what]]:
        differs = "differs" if len(others) == 1 else "differ"
        raise CheckpointError(
            f"{checkpoint}: the {' and the '.join(others)} named now {differs} in content from what it saw; "
            "name the same, or add --ignore_data_skip to go on all the same"
        )


def fingerprint_of_rows(rows: Iterable[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def fingerprint_of_tokenizer(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return _sha256(content.encode())


def fingerprint_of_base(base: nn.Module) -> str:
    """Of names, shapes, dtypes and bytes of all tensors; of bases over 4 GiB, of 4 KiB from both ends and the middle of
    each tensor. Where the base lies and what it is called do not matter."""
    digest = hashlib.sha256()
    tensors = base.state_dict()
    sampled = sum(t.nbytes for t in tensors.values()) > WHOLE_HASH_BYTES
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        starts = {0, max(0, len(content) // 2), max(0, len(content) - 4096)} if sampled else [0]
        for start in sorted(starts):
            digest.update(content[start : start + 4096 if sampled else None].numpy().data)
    return digest.hexdigest()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
