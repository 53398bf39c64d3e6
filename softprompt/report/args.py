"""Settings of `python -m softprompt report`, validated as in `config.loader`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from softprompt.config.arg_parser import FlagParser
from softprompt.config.schema import build, is_text, option
from softprompt.config.train_args import RUNS
from softprompt.runs.file_names import REPORT_FILE
from softprompt.utils.errors import ConfigError
from softprompt.utils.translation import translate

EXAMPLES = (
    ("Write runs/one/report.html again", "runs/one"),
    ("Follow a run that is still training", "--watch runs/one"),
    ("Compare two runs", "runs/one runs/two"),
)


@dataclass(frozen=True)
class ReportArguments:
    """Flags of `python -m softprompt report`."""

    _argument_group_name: ClassVar[str] = "report"

    output_file: str | None = option(
        None,
        f"Write the page to this file. (default: {REPORT_FILE} in the run's folder, or a file under {RUNS}/ that is "
        "named after the runs if several are given)",
        "FILE",
    )


class ReportRequest(NamedTuple):
    """The folders of the runs, the file to write (None: the default), and whether to rewrite it while they train."""

    runs: list[str]
    output_file: str | None
    watch: bool


def report_arguments(runs: Sequence[str], watch: bool = False, **given: Any) -> ReportRequest:
    """Check the settings of a report.

    Args:
        runs: Folders of runs.
        watch: Whether to rewrite the page while the runs train.
        given: The command's other flags as keyword arguments.

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
    return ReportRequest(runs, arguments.output_file, watch)


def parse_report(argv: Sequence[str]) -> ReportRequest:
    """Return what `report_arguments` returns, from the command line of `report`.

    Raises:
        ConfigError: An argument is wrong.
    """
    description = "Write one HTML page about one run, or about several runs side by side."
    usage = "RUN [RUN …] [--flag value …]"
    parser = FlagParser([ReportArguments], "report", description, usage, examples=EXAMPLES)
    parser.add_argument(
        "--watch",
        action="store_true",
        help=translate(
            "Write the page again whenever a run has logged something, until the runs end or Ctrl-C is pressed. A "
            "browser that shows the page reloads it automatically."
        ),
    )
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help=translate("Folder of a training run (its --output_dir).")
    )
    return report_arguments(**parser.parse(argv))
