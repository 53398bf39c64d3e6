"""Short runs in this process, killed after some step, and what they leave. The fixture `run_settings` has their
settings."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import softprompt
from softprompt.prompt.adapter_io import json_bytes
from softprompt.runs.checkpoints import with_checksums
from softprompt.runs.file_names import CHECKSUMS_FILE, STATE_FILE
from softprompt.training.callbacks import RunCallbacks
from softprompt.utils.atomic_io import write_folder

ROWS = [{"instruction": f"第{i}题" * (1 + i % 3), "output": "好" if i % 2 else "坏"} for i in range(23)]


WITHOUT_PICTURES = {"matplotlib": None, "matplotlib.figure": None}  # of sys.modules: as if it was not installed


class Killed(BaseException):
    """Stands for `kill -9`: no `except Exception` of the program catches it."""


def interrupted(settings: dict[str, Any], at: int) -> None:
    """Train, and kill the run as soon as step `at` is done, before anything that is due after that step."""
    on_step = RunCallbacks.on_step

    def on_step_and_die(self, step):
        on_step(self, step)
        if step.number == at:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunCallbacks, "on_step", on_step_and_die)
        with pytest.raises(Killed):
            softprompt.train(**settings)


def rewrite_state(checkpoint: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Replace a checkpoint's trainer_state.json by what `change` makes of it, with checksums that fit."""
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.name != CHECKSUMS_FILE}
    files[STATE_FILE] = json_bytes(change(json.loads(files[STATE_FILE])))
    write_folder(checkpoint, with_checksums(files))


def outcome(folder: str | Path = "run") -> tuple[bytes, list[dict[str, Any]], dict[str, Any]]:
    """What two equal runs have in common: the prompt's bytes, the metrics without speeds, the results without times."""
    records = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    results = json.loads(Path(folder, "all_results.json").read_text())
    return (
        Path(folder, "adapter_model.safetensors").read_bytes(),
        [_without(record, "tokens_per_second") for record in records],
        _without(results, "train_runtime", "train_tokens_per_second"),
    )


def _without(record: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in names}
