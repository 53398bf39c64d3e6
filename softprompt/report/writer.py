"""A page about runs: `python -m softprompt report RUN [RUN …]`; train.py makes that of its own run by itself."""

import os
from collections.abc import Sequence
from pathlib import Path

from softprompt.report.args import ReportConfig, report_config
from softprompt.report.likeness import add_likeness
from softprompt.report.page import page
from softprompt.runs.file_names import MARK, REPORT_FILE
from softprompt.runs.run_reader import RunRecord, read_run
from softprompt.utils.atomic_io import write_files
from softprompt.utils.errors import OutputError, PartialFailureError, ReportError


def report(*runs: str | os.PathLike[str], output_file: str | os.PathLike[str] | None = None) -> Path:
    """Write the page of one or several runs, by default as report.html into the one's folder, or where this is called.
    Returns where it is. Of several runs, those that cannot be read are named on the page, which has the others.

    Raises:
        ConfigError: no run, or one that is named twice.
        ReportError: a folder that is not there, or holds no run, no metrics, or broken files; of several, the first.
        PartialFailureError: some of several runs cannot be read; the page is written.
        OutputError: `output_file` cannot be written, or is there and no report.
    """
    return write_report(report_config([os.fspath(run) for run in runs], output_file=output_file))


def write_report(config: ReportConfig) -> Path:
    """Write the page that `config` names, as `report` does."""
    records, broken = _read(config.runs)
    default = records[0].folder / REPORT_FILE if len(config.runs) == 1 else Path(REPORT_FILE)
    path = Path(config.output_file) if config.output_file else default
    _refuse_other(path)
    content, of_content = _page(records, broken)
    broken += of_content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_files(path.parent, {path.name: content.encode()})
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}); name a file with --output_file") from None
    if broken:
        told = f"{len(broken):,} of {len(config.runs):,} runs cannot be shown"
        raise PartialFailureError(f"{told} ({broken[0]}); {path} has the others")
    return path


def _read(runs: Sequence[str]) -> tuple[list[RunRecord], list[str]]:
    """The runs, and what is wrong with those that cannot be read. Raises ReportError where one is not there, or none
    can be read."""
    records, broken = list[RunRecord](), list[ReportError]()
    for run in runs:
        try:
            records.append(add_likeness(read_run(run)))
        except ReportError as error:
            if not Path(run).is_dir():
                raise
            broken.append(error)
    if not records:
        raise broken[0]
    return records, list(map(str, broken))


def _page(records: Sequence[RunRecord], broken: Sequence[str]) -> tuple[str, list[str]]:
    """The page, and what is wrong with runs that are left out of it as their files hold what no page can show. Raises
    ReportError where that is so of all of them."""
    try:
        return page(records, broken), []
    except ReportError:
        if len(records) == 1:
            raise
    shown, faults = list[RunRecord](), list[ReportError]()
    for record in records:
        try:
            page([record])
            shown.append(record)
        except ReportError as error:
            faults.append(error)
    if not shown or not faults:
        raise (faults or [ReportError("these runs cannot be shown on one page; name each alone")])[0]
    told = list(map(str, faults))
    return page(shown, [*broken, *told]), told


def _refuse_other(path: Path) -> None:
    """Raises OutputError where `path` is there and not an older report."""
    if not os.path.lexists(path):
        return
    if not path.is_file():
        raise OutputError(f"{path}: is no file; name a file with --output_file")
    with open(path, "rb") as file:
        if MARK.encode() not in file.read(4096):
            raise OutputError(f"{path}: is there already and is no report; name another file with --output_file")
