"""Write the report of one or several runs: `python -m softprompt report RUN [RUN …]`.

train.py writes the report of its own run (see `after_training`); `watch` rewrites the report of a run that is still
training.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from softprompt.config.train_args import RUNS
from softprompt.report.args import report_arguments
from softprompt.report.nearest_words import add_nearest_words
from softprompt.report.page import page
from softprompt.runs.file_names import MARK, REPORT_FILE
from softprompt.runs.run_reader import RunRecord, read_run
from softprompt.utils.atomic_io import write_files
from softprompt.utils.errors import OutputError, PartialFailureError, ReportError
from softprompt.utils.named_folders import check_run_folder

LONGEST_NAME = 120  # maximum bytes of the file name of a page about several runs


def report(*runs: str | os.PathLike[str], output_file: str | os.PathLike[str] | None = None) -> Path:
    """Write the page of one or several runs and return its path.

    If some of several runs cannot be read, the page names them and shows the others.

    Args:
        runs: Folders of runs.
        output_file: The file to write. By default it is report.html in the run's folder, or a file under runs/ that is
            named after the runs if several are given.

    Raises:
        ConfigError: No run is given, or a run is given twice.
        ReportError: A folder does not exist, or no run can be shown, because the folders hold no run, a run without
            metrics, or broken files.
        PartialFailureError: Some of several runs cannot be shown; the page is written with the others.
        OutputError: `output_file` cannot be written, or exists and is not a report.
    """
    request = report_arguments([os.fspath(run) for run in runs], output_file=output_file)
    return write_report(request.runs, request.output_file)


def write_report(runs: Sequence[str], output_file: str | None) -> Path:
    """Write the page of the runs whose arguments `report_arguments` has checked; see `report`."""
    path = report_file(runs, output_file)
    content, broken = report_page(runs)
    write_page(path, content)
    if broken:
        failed = f"{len(broken):,} of {len(runs):,} runs cannot be shown"
        raise PartialFailureError(f"{failed} ({broken[0]}); {path} shows the others")
    return path


def report_file(runs: Sequence[str], output_file: str | None) -> Path:
    """Return the file to write: `output_file`, or the default.

    Raises:
        ReportError: A run's folder does not exist.
        OutputError: The file exists and is not a report.
    """
    for run in runs:
        check_run_folder(run)
    if output_file is None:
        path = Path(runs[0]) / REPORT_FILE if len(runs) == 1 else RUNS / _name_of_several(runs)
    else:
        path = Path(output_file)
    _refuse_foreign_file(path)
    return path


def report_page(runs: Sequence[str], live: bool = False) -> tuple[str, list[str]]:
    """Return the page of the runs, and an error for each run that it does not show. A live page leaves out the nearest
    words of unfinished runs, since reading a base's embeddings again and again would slow training down.

    Raises:
        ReportError: No run can be shown.
    """
    records, broken = list[RunRecord](), list[ReportError]()
    for run in runs:
        try:
            record = read_run(run)
            records.append(record if live else add_nearest_words(record))
        except ReportError as error:
            broken.append(error)
    if not records:
        raise broken[0]
    return _page(records, [str(error) for error in broken], live)


def write_page(path: Path, content: str) -> None:
    """Write a page atomically.

    Raises:
        OutputError: The file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_files(path.parent, {path.name: content.encode()})
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}); name a file with --output_file") from None


def _page(records: Sequence[RunRecord], broken: list[str], live: bool) -> tuple[str, list[str]]:
    """Return the page, and an error for each run that is not on it: those in `broken`, and those whose files have
    content that cannot be shown. Raises ReportError if no run can be shown."""
    try:
        return page(records, broken, live), broken
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
    broken = [*broken, *map(str, errors)]
    return page(shown, broken, live), broken


def _name_of_several(runs: Sequence[str]) -> str:
    """Return the file name of a page about several runs: their names, or the first one's and a hash if they are long or
    equal."""
    names = [Path(run).name or Path(run).resolve().name for run in runs]
    whole = f"report-{'-'.join(names)}.html"
    if len(set(names)) == len(names) and len(whole.encode()) <= LONGEST_NAME:
        return whole
    hashed = hashlib.sha256("\n".join(runs).encode()).hexdigest()[:8]
    first = names[0].encode()[:60].decode(errors="ignore")
    return f"report-{first}-and-{len(runs) - 1}-others-{hashed}.html"


def _refuse_foreign_file(path: Path) -> None:
    """Raise OutputError if `path` exists and is not a report."""
    if not os.path.lexists(path):
        return
    if not path.is_file():
        raise OutputError(f"{path}: is not a file; name a file with --output_file")
    with open(path, "rb") as file:
        if MARK.encode() not in file.read(4096):
            raise OutputError(f"{path}: exists and is not a report; name another file with --output_file")
