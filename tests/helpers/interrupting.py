"""Runs that end without a word, for tests of going on with them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import softprompt
from softprompt.prompt.adapter_io import json_bytes
from softprompt.runs.checkpoints import with_checksums
from softprompt.runs.file_names import CHECKSUMS_FILE, STATE_FILE
from softprompt.training import callbacks as recorder
from softprompt.utils.atomic_io import write_folder


class Killed(BaseException):
    """Not an error that anything could catch."""


def interrupted(settings, at: int) -> None:
    """The run, ended without a word once step `at` is done."""
    with pytest.MonkeyPatch.context() as patch:

        def on_step(self, step):
            self.log.on_step(step)
            if step.number == at:
                raise Killed

        patch.setattr(recorder.RunCallbacks, "on_step", on_step)
        with pytest.raises(Killed):
            softprompt.train(**settings)


def restated(checkpoint: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Write a checkpoint's trainer_state.json anew, changed, with checksums that fit."""
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.name != CHECKSUMS_FILE}
    files[STATE_FILE] = json_bytes(change(json.loads(files[STATE_FILE])))
    write_folder(checkpoint, with_checksums(files))
