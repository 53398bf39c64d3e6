"""Settings of `python -m softprompt report`, validated as in `config.loader`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from softprompt.config.arg_parser import FlagParser
from softprompt.config.schema import build, is_text, option
from softprompt.runs.file_names import REPORT_FILE
from softprompt.utils.errors import ConfigError

EXAMPLES = (
    ("Write runs/one/report.html anew", "runs/one"),
    ("Show a run that is still training", "runs/one --output_file so-far.html"),
    ("Compare two runs", "runs/one runs/two --output_file compared.html"),
)


@dataclass(frozen=True)
class ReportArguments:
    """Flags of `python -m softprompt report`."""

    _argument_group_name: ClassVar[str] = "report"

    output_file: str | None = option(
        None,
        f"Write the page to this file. (default: {REPORT_FILE} in the run's folder, or in the current folder if "
        "several runs are given)",
        "FILE",
    )


def report_arguments(runs: Sequence[str], **given: Any) -> tuple[list[str], str | None]:
    """Return the folders of the runs, and the file to write (None: the default).

    Args:
        runs: Folders of runs.
        given: The command's flags as keyword arguments.

    Raises:
        ConfigError: A setting is unknown or has a wrong value, no run is named, or a run is named twice.
    """
    (arguments,) = build([ReportArguments], given)
    if not runs or not all(runs):
        raise ConfigError("no run is named; give the OUTPUT_DIR of one or several")
    if undecodable := [run for run in runs if not is_text(run)]:
        raise ConfigError(f"{undecodable[0]!r} is not UTF-8; rename that folder")
    runs = [os.path.expanduser(run) for run in runs]
    paths = [os.path.realpath(run) for run in runs]
    if twice := [run for run, path in zip(runs, paths, strict=True) if paths.count(path) > 1]:
        raise ConfigError(f"{twice[-1]} is named twice; name each run once")
    if arguments.output_file == "":
        raise ConfigError("--output_file is empty; name the file to write, or leave it out")
    return runs, arguments.output_file


def parse_report(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """Return what `report_arguments` returns, from the command line of `report`.

    Raises:
        ConfigError: An argument is wrong.
    """
    description = "Write one HTML page about one run, or about several runs side by side."
    usage = "RUN [RUN …] [--flag value …]"
    parser = FlagParser([ReportArguments], "report", description, usage, examples=EXAMPLES)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="Folder of a training run (its --output_dir).")
    return report_arguments(**parser.parse(argv))
