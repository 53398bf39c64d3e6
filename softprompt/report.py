"""A page about runs: `python -m softprompt.report RUN [RUN …]`; train.py makes that of its own run by itself."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from softprompt.cli import command, parse_report
from softprompt.errors import OutputError
from softprompt.files import write_files
from softprompt.page import MARK, page
from softprompt.pictures import INSTALL, installed
from softprompt.record import read_run
from softprompt.report_config import REPORT_FILE, ReportConfig, report_config
from softprompt.so_far import with_likeness


def report(*runs: str | os.PathLike[str], output_file: str | os.PathLike[str] | None = None) -> Path:
    """Write the page of one or several runs, by default as report.html into the one's folder, or where this is called.
    Returns where it is.

    Raises:
        ConfigError: no run, or one that is named twice.
        ReportError: a folder that is not there, or holds no run, no metrics, or broken files.
        OutputError: `output_file` cannot be written, or is there and no report.
    """
    return _report(report_config([os.fspath(run) for run in runs], output_file=output_file))


def _report(config: ReportConfig) -> Path:
    records = [with_likeness(read_run(run)) for run in config.runs]
    default = records[0].folder / REPORT_FILE if len(records) == 1 else Path(REPORT_FILE)
    path = Path(config.output_file) if config.output_file else default
    _refuse_other(path)
    content = page(records).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_files(path.parent, {path.name: content})
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}); name a file with --output_file") from None
    return path


def _refuse_other(path: Path) -> None:
    """Raises OutputError where `path` is there and not an older report."""
    if not path.exists():
        return
    if not path.is_file():
        raise OutputError(f"{path}: is no file; name a file with --output_file")
    with open(path, "rb") as file:
        if MARK.encode() not in file.read(4096):
            raise OutputError(f"{path}: is there already and is no report; name another file with --output_file")


def main(argv: Sequence[str]) -> None:
    path = _report(parse_report(argv))
    if not installed():
        print(f"warning: no pictures, as matplotlib is not installed: {INSTALL}", file=sys.stderr)
    print(path)


if __name__ == "__main__":
    command(main)
