"""Settings of the command `report`, and their validation."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from softprompt.config.schema import build, is_text, option
from softprompt.runs.file_names import REPORT_FILE
from softprompt.utils.errors import ConfigError


@dataclass(frozen=True)
class ReportArguments:
    _argument_group_name: ClassVar[str] = "report"

    output_file: str | None = option(
        None,
        f"Write the page into this file. (default: {REPORT_FILE} in the run's folder; of several runs, in the current "
        "folder)",
    )


@dataclass(frozen=True)
class ReportConfig:
    """The settings of one report: the folders of its runs, and the file to write."""

    runs: Sequence[str]
    output_file: str | None


def report_config(runs: Sequence[str], **given: Any) -> ReportConfig:
    """Return validated settings of a report from keyword arguments with the names of the flags.

    Raises:
        ConfigError: as of `config.loader.train_config`, no run, or a run that is given twice.
    """
    (arguments,) = build([ReportArguments], given)
    if not runs or not all(runs):
        raise ConfigError("no run is named; give the folder of one run, or of several")
    if unfit := [run for run in runs if not is_text(run)]:
        raise ConfigError(f"{unfit[0]!r} is not UTF-8; rename that folder")
    runs = [os.path.expanduser(run) for run in runs]
    places = [os.path.realpath(run) for run in runs]
    if twice := [run for run, place in zip(runs, places, strict=True) if places.count(place) > 1]:
        raise ConfigError(f"{twice[-1]} is named twice; name each run once")
    if arguments.output_file == "":
        raise ConfigError("--output_file is empty; name the file to write, or leave it out")
    return ReportConfig(list(runs), arguments.output_file)
