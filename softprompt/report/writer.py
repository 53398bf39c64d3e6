"""Write the report of one or several runs: `python -m softprompt report RUN [RUN …]`.

train.py writes the report of its own run (see `after_training`).
"""

import os
from collections.abc import Sequence
from pathlib import Path

from softprompt.report.args import report_arguments
from softprompt.report.nearest_words import add_nearest_words
from softprompt.report.page import page
from softprompt.runs.file_names import MARK, REPORT_FILE
from softprompt.runs.run_reader import RunRecord, read_run
from softprompt.utils.atomic_io import write_files
from softprompt.utils.errors import OutputError, PartialFailureError, ReportError


def report(*runs: str | os.PathLike[str], output_file: str | os.PathLike[str] | None = None) -> Path:
    """Write the page of one or several runs and return its path.

    If some of several runs cannot be read, the page names them and shows the others.

    Args:
        runs: Folders of runs.
        output_file: The file to write. By default it is report.html in the run's folder, or in the current folder if
            several runs are given.

    Raises:
        ConfigError: No run is given, or a run is given twice.
        ReportError: A folder does not exist, or no run can be shown: a folder holds no run, no metrics or broken files.
        PartialFailureError: Some of several runs cannot be shown; the page is written with the others.
        OutputError: `output_file` cannot be written, or exists and is not a report.
    """
    return write_report(*report_arguments([os.fspath(run) for run in runs], output_file=output_file))


def write_report(runs: Sequence[str], output_file: str | None) -> Path:
    """Write the page of the runs whose arguments `report_arguments` has checked; see `report`."""
    records, broken = _read(runs)
    default = records[0].folder / REPORT_FILE if len(runs) == 1 else Path(REPORT_FILE)
    path = Path(output_file) if output_file else default
    _refuse_foreign_file(path)
    content, unshown = _page(records, broken)
    broken += unshown
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_files(path.parent, {path.name: content.encode()})
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}); name a file with --output_file") from None
    if broken:
        failed = f"{len(broken):,} of {len(runs):,} runs cannot be shown"
        raise PartialFailureError(f"{failed} ({broken[0]}); {path} shows the others")
    return path


def _read(runs: Sequence[str]) -> tuple[list[RunRecord], list[str]]:
    """Return the runs that can be read, and the error of each other run. Raises ReportError if a folder does not exist,
    or no run can be read."""
    records, broken = list[RunRecord](), list[ReportError]()
    for run in runs:
        try:
            records.append(add_nearest_words(read_run(run)))
        except ReportError as error:
            if not Path(run).is_dir():
                raise
            broken.append(error)
    if not records:
        raise broken[0]
    return records, list(map(str, broken))


def _page(records: Sequence[RunRecord], broken: Sequence[str]) -> tuple[str, list[str]]:
    """Return the page, and an error for each run that is left out because the content of its files cannot be shown.
    Raises ReportError if no run can be shown."""
    try:
        return page(records, broken), []
    except ReportError:
        if len(records) == 1:
            raise
    shown, errors = list[RunRecord](), list[ReportError]()
    for record in records:
        try:
            page([record])
            shown.append(record)
        except ReportError as error:
            errors.append(error)
    if not shown or not errors:
        raise (errors or [ReportError("these runs cannot be shown on one page; report each run separately")])[0]
    unshown = list(map(str, errors))
    return page(shown, [*broken, *unshown]), unshown


def _refuse_foreign_file(path: Path) -> None:
    """Raise OutputError if `path` exists and is not a report."""
    if not os.path.lexists(path):
        return
    if not path.is_file():
        raise OutputError(f"{path}: is not a file; name a file with --output_file")
    with open(path, "rb") as file:
        if MARK.encode() not in file.read(4096):
            raise OutputError(f"{path}: exists and is not a report; name another file with --output_file")
