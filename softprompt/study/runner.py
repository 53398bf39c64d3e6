"""Run the cells of a study. Every base is loaded once, after the previous one has been freed.

A finished cell is a folder, which is written atomically; the cell is never run again. A cell that fails leaves no
folder: the other cells run, and the next call tries the failed one again. The folder of a finished cell contains:

adapter_config.json, adapter_model.safetensors, softprompt.json, README.md   the learned prompt, in the files of any run
cell.json                                                                    settings, fingerprints, metrics, answers
checksums.json                                                               sha256 of each of these files

An ensemble has only the last two: its prompts are in the folders of its members. If a cell fails with an error that is
not one of this project's own, FOLDER.error.txt beside the folders holds the traceback.
"""

import contextlib
import gc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from softprompt.prompt.adapter_io import json_bytes
from softprompt.runs.checkpoints import with_checksums
from softprompt.runs.crash_report import Failure, failure
from softprompt.study.cell_runner import FinishedCell, LoadedBase
from softprompt.study.plan import PlannedCell, virtual_tokens
from softprompt.study.results import CELL_FILE, CellRecord, group_by
from softprompt.training.loop import QuietCallbacks
from softprompt.training.stop_signals import StopRequest
from softprompt.utils.atomic_io import write_files, write_folder
from softprompt.utils.errors import Stopped

T = TypeVar("T")


def run_cells(
    plan: Sequence[PlannedCell], on_step: Callable[[], None], on_cell: Callable[[PlannedCell, CellRecord], None]
) -> None:
    """Run the cells of `plan`, grouped by base, and write each to its folder.

    Args:
        plan: The cells; an ensemble comes after its members.
        on_step: Called after every optimizer step.
        on_cell: Called with each cell and its record, also if the cell failed.

    Raises:
        Stopped: A signal requested it. The cell that was running leaves no result.
        OSError: A cell cannot be written.
    """
    for planned in plan:
        if planned.failed:
            _write_error(planned, planned.failed)
            on_cell(planned, failed_record(planned, planned.failed.line))
    with StopRequest() as request:
        runnable = [planned for planned in plan if not planned.failed]
        for of_base in group_by(runnable, lambda planned: planned.cell.config.model).values():
            _run_over_base(of_base, request, on_step, on_cell)
            _release_memory()  # nothing refers to the base any more, and the next one may need its memory


def failed_record(planned: PlannedCell, why: str) -> CellRecord:
    """Return the record of a cell that has no result. The record is shown, but not written."""
    return {
        **planned.description(),
        "parameters": 0,  # unknown for a base that cannot be loaded
        "virtual_tokens": virtual_tokens(planned.cell, planned.inputs),
        "metrics": {},
        "seconds": 0.0,
        "failed": why,
    }


def _run_over_base(
    of_base: Sequence[PlannedCell],
    request: StopRequest,
    on_step: Callable[[], None],
    on_cell: Callable[[PlannedCell, CellRecord], None],
) -> None:
    """Load a base and run its cells. No reference to the base remains afterwards."""
    base = _result_or_failure(lambda: LoadedBase.load(of_base[0].cell.config.model))
    for of_rows in group_by(of_base, lambda planned: planned.cell.config.data).values():
        for planned in of_rows:
            if isinstance(base, LoadedBase):
                planned = base.with_learning_rate(planned)
            callbacks = QuietCallbacks(request, on_step)
            finished = base if isinstance(base, Failure) else _result_or_failure(partial(base.run, planned, callbacks))
            if callbacks.code is None:
                on_cell(planned, _write(planned, finished))
            if (code := request.exit_code) is not None:
                raise Stopped("stopped; run the same command to continue with the remaining cells", code)


def _result_or_failure(do: Callable[[], T]) -> T | Failure:
    """Return what `do` returns, or why it failed."""
    try:
        return do()
    except Stopped:
        raise
    except Exception as error:
        found = failure(error)
    _release_memory()  # held by tensors in the frames of the error
    return found


def _write(planned: PlannedCell, finished: FinishedCell | Failure) -> CellRecord:
    """Write a cell's folder, or the traceback of its failure, and return its record."""
    if isinstance(finished, Failure):
        _write_error(planned, finished)
        return failed_record(planned, finished.line)
    files = {**finished.adapter, CELL_FILE: json_bytes(finished.record)}
    write_folder(planned.folder, with_checksums(files))
    _error_file(planned).unlink(missing_ok=True)
    return finished.record


def _write_error(planned: PlannedCell, why: Failure) -> None:
    if why.report:
        file = _error_file(planned)
        with contextlib.suppress(OSError):
            write_files(file.parent, {file.name: why.report.encode(errors="backslashreplace")})


def _error_file(planned: PlannedCell) -> Path:
    return planned.folder.parent / f"{planned.folder.name}.error.txt"


def _release_memory() -> None:
    gc.collect()  # a base may be part of a reference cycle
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
