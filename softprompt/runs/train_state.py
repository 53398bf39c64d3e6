"""Find the checkpoint that a run resumes, and read the state of the loop from it. `training.resume_settings` merges its
settings with those given now. Besides the adapter, a checkpoint holds these files:

optimizer.safetensors        AdamW's moments [P, H] fp32 and step count
prompt_encoder.safetensors   the values of the encoder; only with --prompt_reparameterization
rng_state.safetensors        states of torch's random generators, uint8
trainer_state.json           position, schedule, scaler, unlogged steps, totals, best, evaluation of the base, settings,
                             fingerprints
metrics.jsonl                all metrics up to this step
checksums.json               sha256 of every other file of the checkpoint
"""

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load

from softprompt.config.loader import TrainConfig
from softprompt.config.train_args import NEWEST
from softprompt.runs.checkpoints import checkpoints, fault_of, newest_whole, read_state_files
from softprompt.runs.file_names import ENCODER_FILE, METRICS_FILE, OPTIMIZER_FILE, RNG_FILE, STATE_FILE
from softprompt.runs.state import Step, TrainingState
from softprompt.utils.errors import CheckpointError, ConfigError
from softprompt.utils.shell_commands import command, flags, train_call
from softprompt.utils.torchrun_env import launched_by_torchrun

# Values of trainer_state.json that the run adds to the state of the loop.
OF_THE_RUN = ("arguments", "fingerprints", "totals", "engine", "best", "rows_per_step")
OF_THIS_CALL = (  # settings that concern only one call, so a resumed run does not take them from its checkpoint
    *("max_time", "resume_from_checkpoint", "ignore_data_skip", "overwrite_output_dir", "dry_run", "print_model"),
    "hub_token",
)


def way_on(output_dir: Path, **settings: Any) -> str:
    """Return a clause for the error message of a failed run. It names the newest complete checkpoint and the command
    that continues the run; `settings` are added to the command."""
    found = newest_whole(output_dir)
    if found is None:
        return "there is no checkpoint yet"
    return f"{found} is whole; continue with: {resume_command(output_dir, **settings)}"


def resume_command(output_dir: Path, **settings: Any) -> str:
    """Return the command or the call that resumes a run with changed `settings`; with torchrun and the same number of
    nodes if torchrun started this process."""
    folder = str(output_dir) if str(output_dir) != NEWEST else os.path.join(".", NEWEST)
    settings = {"resume_from_checkpoint": folder, **settings}
    if not launched_by_torchrun():
        return train_call(settings)
    local, size = (os.environ.get(name, "1") for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    nodes = f" --nnodes={int(size) // int(local)} …" if size != local else ""
    return command("train", f"torchrun --nproc_per_node={local}{nodes}") + flags(settings)


def find_checkpoint(config: TrainConfig) -> Path | None:
    """Return the checkpoint that `--resume_from_checkpoint` selects. Return None if the flag is not given; or if it is
    given without a value, and the run has no checkpoint yet.

    The value is a checkpoint-N folder, or a run's folder, whose newest complete checkpoint is selected. Without a
    value, the run's folder is --output_dir.

    Raises:
        ConfigError: There is neither a value nor --output_dir.
        CheckpointError: The checkpoint is not whole, or the run has no whole checkpoint.
    """
    named = config.training.resume_from_checkpoint
    if named is None:
        return None
    if named == NEWEST and config.training.output_dir is None:
        raise ConfigError(
            "--resume_from_checkpoint without a folder continues the run in --output_dir; give --output_dir, or the "
            "folder of a run or a checkpoint"
        )
    folder = Path(str(config.training.output_dir if named == NEWEST else named))
    if (folder / STATE_FILE).exists() and not checkpoints(folder):
        if fault := fault_of(folder):
            raise CheckpointError(f"--resume_from_checkpoint {folder}: {fault}; take an earlier checkpoint")
        return folder
    if found := newest_whole(folder, print):
        return found
    if checkpoints(folder):
        raise CheckpointError(f"no checkpoint in {folder} is whole; start a new run with --overwrite_output_dir")
    if named != NEWEST:
        raise CheckpointError(f"--resume_from_checkpoint {folder}: no checkpoint there; name a run or a checkpoint-N")
    print(f"no checkpoint in {folder} yet: starting at step 0")
    return None


def run_folder(config: TrainConfig) -> Path | None:
    """Return the folder that a run will be written to: --output_dir, else the folder of the resumed run, else None."""
    named = config.training.resume_from_checkpoint
    if config.training.output_dir is not None:
        return Path(config.training.output_dir)
    if named in (None, NEWEST):
        return None
    folder = Path(str(named))
    return folder.parent if (folder / STATE_FILE).exists() and not checkpoints(folder) else folder


def load_state(checkpoint: Path) -> tuple[TrainingState, dict[str, Any]]:
    """Read a whole checkpoint. Return the state of the loop, and a dict of the other values of trainer_state.json
    (OF_THE_RUN), the evaluation of the base (`base_evaluation`; None if an earlier version wrote the checkpoint, or
    without held-out rows) and the metrics (`history`).

    Raises:
        CheckpointError: Another version wrote the checkpoint, and values that this version needs are missing.
    """
    files = read_state_files(checkpoint)
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
            load(files[ENCODER_FILE]) if ENCODER_FILE in files else {},
        )
        saved = {name: values[name] for name in OF_THE_RUN}
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint / STATE_FILE}: not a training state of this version ({error}); continue with the version "
            "that wrote it, or start a new run with --overwrite_output_dir"
        ) from None
    saved["base_evaluation"] = values.get("base_evaluation")
    metrics = (checkpoint / METRICS_FILE).read_bytes()
    return state, {**saved, "history": [json.loads(line) for line in metrics.splitlines()]}
