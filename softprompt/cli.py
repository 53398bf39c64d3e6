"""The command line: one function per command, and errors as one line on stderr with an exit code.

`softprompt COMMAND …` and `python -m softprompt COMMAND …` run them all; train.py and infer.py run one each.
"""

import errno
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from softprompt.config.arg_parser import FlagParser, read_toml
from softprompt.config.infer_args import INFER_GROUPS, InferConfig, infer_config
from softprompt.config.loader import GROUPS, PRESETS, TrainConfig, train_config
from softprompt.config.unknown_names import advice
from softprompt.export.args import ExportArguments, ExportConfig, export_config
from softprompt.report.args import ReportArguments, ReportConfig, report_config
from softprompt.study.grid import Study, read_study, relocated
from softprompt.utils.errors import ConfigError, OtherRankError, PushError, SoftpromptError, Stopped
from softprompt.utils.redact import redacted
from softprompt.utils.std_streams import answers_on_stdout, discard_buffer, reopen_closed_streams, tolerant_streams
from softprompt.utils.torchrun_env import is_distributed, is_main, may_restart


class Command(NamedTuple):
    """A subcommand: what runs it, its line of help, and whether its output is the answers that were asked for."""

    run: Callable[[Sequence[str]], None]
    help: str
    prints_answers: bool = False


def train(argv: Sequence[str]) -> None:
    """Train a prompt, or say what a run would do (`--dry_run`)."""
    config = parse_training(argv)

    from softprompt.api import run_and_report  # after parsing: a wrong flag need not wait for torch
    from softprompt.distributed.process_group import process_group
    from softprompt.training.dry_run import dry_run
    from softprompt.training.summary import summary

    with process_group() as world:
        if config.training.dry_run:
            print(dry_run(config, world))
            return
        run = run_and_report(config, world)
        print(summary(run))
    if run.not_pushed:
        raise PushError(run.not_pushed)


def infer(argv: Sequence[str]) -> None:
    """Answer one question or a file of them, evaluate adapters, or chat on a terminal."""
    config = parse_inference(argv)

    from softprompt.inference import infer

    infer(config)


def export(argv: Sequence[str]) -> None:
    """Write base and prompt as one plain transformers model."""
    config = parse_export(argv)

    from softprompt.export.plain_model import write_plain_model

    print(write_plain_model(config))


def report(argv: Sequence[str]) -> None:
    """Write one page about one or several runs."""
    config = parse_report(argv)

    from softprompt.report.svg import INSTALL, installed
    from softprompt.report.writer import write_report

    path = write_report(config)
    if not installed():
        print(f"warning: no pictures, as matplotlib is not installed: {INSTALL}", file=sys.stderr)
    print(path)


def study(argv: Sequence[str]) -> None:
    """Train every cell of a grid, and say what the figures show."""
    plan = parse_study(argv)

    from softprompt.study.study import run_study

    run_study(plan)


COMMANDS = {
    "train": Command(train, "learn a soft prompt for a frozen language model (as train.py)"),
    "infer": Command(infer, "ask a base with a learned prompt (as infer.py)", prints_answers=True),
    "chat": Command(infer, "a conversation on the terminal (infer without a question)", prints_answers=True),
    "export": Command(export, "write base and prompt as one plain transformers model"),
    "report": Command(report, "write one page about one or several runs"),
    "study": Command(study, "train every cell of a grid, and say what the figures show"),
}


def main() -> NoReturn:
    """Run the subcommand that the command line names."""
    name, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    known = COMMANDS.get(name)
    run_command((lambda _: _usage(name)) if known is None else known.run, rest, bool(known and known.prints_answers))


def _usage(name: str) -> None:
    if name not in ("-h", "--help", "help"):
        raise ConfigError(f"unknown command {name}{advice(name, COMMANDS)}; there are {', '.join(COMMANDS)}")
    print("usage: softprompt COMMAND [--flag value …]\n")
    for command, (_, help, _) in COMMANDS.items():
        print(f"  {command:8}{help}")
    print("\nsoftprompt COMMAND --help lists the flags of each.")


def parse_training(argv: Sequence[str]) -> TrainConfig:
    """Settings of train.py: flags over --config FILE.toml over the preset over the defaults.

    Raises:
        ConfigError: flags or file that are wrong in whatever way.
    """
    parser = FlagParser(GROUPS, "train.py", "Learn a soft prompt for a frozen language model.")
    start = parser.add_argument_group("start")
    start.add_argument(
        "--preset",
        help=f"Defaults to start from: {', '.join(PRESETS)}. (default: mini; none where --model_name_or_path is given)",
    )
    start.add_argument("--config", metavar="FILE.toml", help="A file of these settings; flags win over it.")
    given = parser.parse(argv)
    from_file = read_toml(given.pop("config"), GROUPS) if "config" in given else {}
    return train_config(**{**from_file, **given})


def parse_inference(argv: Sequence[str]) -> InferConfig:
    """Settings of infer.py.

    Raises:
        ConfigError: flags that are wrong in whatever way.
    """
    return infer_config(**FlagParser(INFER_GROUPS, "infer.py", "Ask a base with a learned prompt.").parse(argv))


def parse_export(argv: Sequence[str]) -> ExportConfig:
    """Settings of `python -m softprompt export`: the adapter's folder, then flags.

    Raises:
        ConfigError: arguments that are wrong in whatever way.
    """
    program = "python -m softprompt export"
    description, usage = (
        "Write base and prompt as one plain transformers model.",
        "ADAPTER --output DIR [--flag value …]",
    )
    parser = FlagParser([ExportArguments], program, description, usage)
    parser.add_argument("adapter", metavar="ADAPTER", help="Adapter folder, ours or PEFT's.")
    return export_config(**parser.parse(argv))


def parse_study(argv: Sequence[str]) -> Study:
    """The study of `python -m softprompt study`: its file, then flags.

    Raises:
        ConfigError: arguments or a file that are wrong in whatever way.
    """
    program = "python -m softprompt study"
    description = "Train every cell of a grid and say what its figures say about a few claims."
    parser = FlagParser([], program, description, "STUDY.toml [--output_dir DIR]")
    parser.add_argument("study", metavar="STUDY.toml", help="What to vary; docs/study.md shows how to write it.")
    parser.add_argument("--output_dir", metavar="DIR", help="Where to write. (default: the file's, or runs/study-NAME)")
    given = parser.parse(argv)
    return relocated(read_study(Path(given["study"]).expanduser()), given.get("output_dir"))


def parse_report(argv: Sequence[str]) -> ReportConfig:
    """Settings of `python -m softprompt report`: folders of runs, then flags.

    Raises:
        ConfigError: arguments that are wrong in whatever way.
    """
    program = "python -m softprompt report"
    description = "Write one page about one run, or several side by side."
    parser = FlagParser([ReportArguments], program, description, "RUN [RUN …] [--flag value …]")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="OUTPUT_DIR of a run of train.py.")
    return report_config(**parser.parse(argv))


def run_command(
    main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None, prints_answers: bool = False
) -> NoReturn:
    """Run `main` on the command line's arguments and exit: 0, or an error's one line on stderr and its code. What it
    prints only accompanies its work, unless it `prints_answers`; then a reader of stdout that leaves ends it."""
    argv = sys.argv[1:] if argv is None else argv
    reopen_closed_streams()
    streams = sys.stdout, sys.stderr
    try:
        with answers_on_stdout() if prints_answers else tolerant_streams():
            _run(main, argv)
    finally:
        for stream in streams:
            try:
                stream.flush()
            except (OSError, ValueError):
                discard_buffer(stream)


def _run(main: Callable[[Sequence[str]], None], argv: Sequence[str]) -> NoReturn:
    try:
        main(argv)
        sys.stdout.flush()
    except Stopped as stop:
        if is_main():
            print(stop, file=sys.stderr)
        _leave(0 if may_restart() else stop.exit_code)  # torchrun would start again what was asked to stop
    except SoftpromptError as error:
        ended = isinstance(error, PushError) and may_restart()  # the run itself
        everywhere = error.exit_code == 2 or isinstance(error, OtherRankError)
        _exit(str(error), 0 if ended else error.exit_code, everywhere)
    except KeyboardInterrupt:
        _exit("stopped", 130)
    except BrokenPipeError:  # `… | head` has read enough
        sys.exit(0)
    except Exception as error:
        if isinstance(error, OSError) and error.filename and not hasattr(error, "output_dir"):  # before a run began
            _exit(f"{error.filename}: {error.strerror}", 2 if error.errno == errno.ENAMETOOLONG else 1)
        from softprompt.runs.crash_report import crash_line

        _exit(crash_line(error), 1)
    sys.exit(0)


def _exit(message: str, code: int, everywhere: bool = False) -> NoReturn:
    """What all of torchrun's ranks meet or have told each other, rank 0 tells; what befell one alone, that one."""
    if is_main() or not everywhere:
        print(f"error: {redacted(' '.join(message.split()))}", file=sys.stderr)
    _leave(code)


def _leave(code: int) -> NoReturn:
    """The connections of several ranks have threads, and an interpreter that ends beneath them may abort."""
    if is_distributed():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
