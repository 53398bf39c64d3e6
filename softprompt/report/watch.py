"""Rewrite the report of runs while they train: `python -m softprompt report --watch RUN`."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from softprompt.report.writer import report_file, report_page, write_page, write_report
from softprompt.runs.file_names import FACTS_FILE, METRICS_FILE, RESULTS_FILE
from softprompt.utils.errors import ReportError
from softprompt.utils.file_lock import FolderLock

POLL_SECONDS = 2.0
WAITING, GOES_ON = (
    "{}: nothing is logged yet; waiting",
    "{}: rewritten until the run ends; Ctrl-C stops watching, not the run",
)


def watch(
    runs: Sequence[str],
    output_file: str | None,
    say: Callable[[str], object],
    pause: Callable[[float], object] = time.sleep,
) -> Path:
    """Write the page of the runs, and write it again whenever one of them has logged something, until all of them have
    ended or Ctrl-C is pressed. Return its path. Nothing else in the runs' folders is touched.

    Args:
        runs, output_file: As `report_arguments` has checked them.
        say: Called with each line to print.
        pause: Waits for a number of seconds.

    Raises:
        ReportError: A folder does not exist, or no run can be shown: it holds no run, or it ended before it logged
            anything.
        OutputError: The file cannot be written, or exists and is not a report.
        KeyboardInterrupt: Ctrl-C was pressed before there was anything to show.
    """
    path, folders = report_file(runs, output_file), [Path(run) for run in runs]
    shown, told = None, ""
    try:
        while any(FolderLock(folder).is_held() for folder in folders):
            if (state := [_state(folder) for folder in folders]) != shown:
                shown = state if _rewrite(path, runs) else None
            if told != (line := WAITING.format(", ".join(runs)) if shown is None else GOES_ON.format(path)):
                say(told := line)
            pause(POLL_SECONDS)
    except KeyboardInterrupt:
        if told != GOES_ON.format(path):
            raise
    return write_report(runs, output_file)


def _rewrite(path: Path, runs: Sequence[str]) -> bool:
    """Write the page of runs that are still training. Return False if there is nothing to show yet, as for a run that
    has just begun. If an error persists, `write_report` raises it when the runs have ended."""
    try:
        write_page(path, report_page(runs, live=True)[0])
    except ReportError:
        return False
    return True


def _state(folder: Path) -> list[tuple[int, int] | None]:
    """Return the modification time in ns and the size of each file that the report is made from (None: no file). They
    change whenever the run writes."""
    return [_stamp(folder / name) for name in (METRICS_FILE, FACTS_FILE, RESULTS_FILE)]


def _stamp(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
