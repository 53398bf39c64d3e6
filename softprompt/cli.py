"""Flags from the dataclasses of settings; errors become one line and an exit code."""

import argparse
import dataclasses
import errno
import os
import re
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

from softprompt.arguments import NEWEST
from softprompt.config import GROUPS, PRESETS, TrainConfig, train_config
from softprompt.console import abandon, answers, messages, open_closed
from softprompt.errors import ConfigError, Elsewhere, PushError, SoftpromptError, Stopped
from softprompt.export_config import ExportArguments, ExportConfig, export_config
from softprompt.fields import AUTO, hints, takes_auto, takes_list
from softprompt.grid import Study, read_study, relocated
from softprompt.infer_config import INFER_GROUPS, GenerationArguments, InferConfig, infer_config
from softprompt.redact import redacted
from softprompt.report_config import ReportArguments, ReportConfig, report_config
from softprompt.torchrun import is_main, may_restart, several
from softprompt.unknown_names import advice


class _Extend(argparse.Action):
    """A flag of several values, which may also be given several times."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, [*getattr(namespace, self.dest, []), *values])


class Parser(HfArgumentParser):
    """HfArgumentParser that raises ConfigError instead of printing its usage, and keeps unset flags out."""

    HINT = r"one that starts with - is written \1=VALUE"

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (--\w+)\S*:", r"\1:", message)
        raise ConfigError(re.sub(r"^(--\w+): expected one argument$", rf"\g<0> ({self.HINT})", message))


def parse_training(argv: Sequence[str]) -> TrainConfig:
    """Settings of train.py: flags over --config FILE.toml over the preset over the defaults.

    Raises:
        ConfigError: flags or file that are wrong in whatever way.
    """
    parser = _parser(GROUPS, "train.py", "Learn a soft prompt for a frozen language model.")
    start = parser.add_argument_group("start")
    start.add_argument(
        "--preset",
        help=f"Defaults to start from: {', '.join(PRESETS)}. (default: mini; none where --model_name_or_path is given)",
    )
    start.add_argument("--config", metavar="FILE.toml", help="A file of these settings; flags win over it.")
    given = _parse(parser, argv)
    from_file = _read_toml(given.pop("config")) if "config" in given else {}
    return train_config(**{**from_file, **given})


def parse_inference(argv: Sequence[str]) -> InferConfig:
    """Settings of infer.py.

    Raises:
        ConfigError: flags that are wrong in whatever way.
    """
    return infer_config(**_parse(_parser(INFER_GROUPS, "infer.py", "Ask a base with a learned prompt."), argv))


def parse_setting(name: str, value: str) -> dict[str, Any]:
    """One of infer.py's generation settings from its text, as its flag has it.

    Raises:
        ConfigError: no such setting, or a value of another type.
    """
    return _parse(_parser((GenerationArguments,), "", ""), [f"--{name}={value}"])


def parse_export(argv: Sequence[str]) -> ExportConfig:
    """Settings of `python -m softprompt.export`: the adapter's folder, then flags.

    Raises:
        ConfigError: arguments that are wrong in whatever way.
    """
    program = "python -m softprompt.export"
    parser = _parser([ExportArguments], program, "Write base and prompt as one plain transformers model.")
    parser.usage = f"{program} ADAPTER --output DIR [--flag value …]"
    parser.add_argument("adapter", metavar="ADAPTER", help="Adapter folder, ours or PEFT's.")
    return export_config(**_parse(parser, argv))


def parse_study(argv: Sequence[str]) -> Study:
    """The study of `python -m softprompt.study`: its file, then flags.

    Raises:
        ConfigError: arguments or a file that are wrong in whatever way.
    """
    program = "python -m softprompt.study"
    parser = _parser([], program, "Train every cell of a grid and say what its figures say about a few claims.")
    parser.usage = f"{program} STUDY.toml [--output_dir DIR]"
    parser.add_argument("study", metavar="STUDY.toml", help="What to vary; docs/study.md shows how to write it.")
    parser.add_argument("--output_dir", metavar="DIR", help="Where to write. (default: the file's, or runs/study-NAME)")
    given = _parse(parser, argv)
    return relocated(read_study(Path(given["study"]).expanduser()), given.get("output_dir"))


def parse_report(argv: Sequence[str]) -> ReportConfig:
    """Settings of `python -m softprompt.report`: folders of runs, then flags.

    Raises:
        ConfigError: arguments that are wrong in whatever way.
    """
    program = "python -m softprompt.report"
    parser = _parser([ReportArguments], program, "Write one page about one run, or several side by side.")
    parser.usage = f"{program} RUN [RUN …] [--flag value …]"
    parser.add_argument("runs", metavar="RUN", nargs="+", help="OUTPUT_DIR of a run of train.py.")
    return report_config(**_parse(parser, argv))


def command(main: Callable[[Sequence[str]], None], prints_answers: bool = False) -> NoReturn:
    """Run `main` on the command line's arguments and exit: 0, or an error's one line on stderr and its code. What it
    prints only accompanies its work, unless it `prints_answers`; then a reader of stdout that leaves ends it."""
    open_closed()
    streams = sys.stdout, sys.stderr
    try:
        with answers() if prints_answers else messages():
            _run(main)
    finally:
        for stream in streams:
            try:
                stream.flush()
            except (OSError, ValueError):
                abandon(stream)


def _run(main: Callable[[Sequence[str]], None]) -> NoReturn:
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except Stopped as stop:
        if is_main():
            print(stop, file=sys.stderr)
        _leave(0 if may_restart() else stop.exit_code)  # torchrun would start again what was asked to stop
    except SoftpromptError as error:
        ended = isinstance(error, PushError) and may_restart()  # the run itself
        everywhere = error.exit_code == 2 or isinstance(error, Elsewhere)
        _exit(str(error), 0 if ended else error.exit_code, everywhere)
    except KeyboardInterrupt:
        _exit("stopped", 130)
    except BrokenPipeError:  # `… | head` has read enough
        sys.exit(0)
    except Exception as error:
        if isinstance(error, OSError) and error.filename and not hasattr(error, "output_dir"):  # before a run began
            _exit(f"{error.filename}: {error.strerror}", 2 if error.errno == errno.ENAMETOOLONG else 1)
        from softprompt.crash import crash_line

        _exit(crash_line(error), 1)
    sys.exit(0)


def _exit(message: str, code: int, everywhere: bool = False) -> NoReturn:
    """What all of torchrun's ranks meet or have told each other, rank 0 tells; what befell one alone, that one."""
    if is_main() or not everywhere:
        print(f"error: {redacted(' '.join(message.split()))}", file=sys.stderr)
    _leave(code)


def _leave(code: int) -> NoReturn:
    """The connections of several ranks have threads, and an interpreter that ends beneath them may abort."""
    if several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _parser(groups: Sequence[Any], program: str, description: str) -> Parser:
    parser = Parser(
        groups, prog=program, description=description, allow_abbrev=False, usage=f"{program} [--flag value …]"
    )
    helps = {f.name: f.metadata["help"].replace("%", "%%") for group in groups for f in dataclasses.fields(group)}
    for action in parser._actions:
        if action.dest in helps:
            shown = "" if action.default is None or "(default" in helps[action.dest] else " (default: %(default)s)"
            action.help = helps[action.dest] + shown
        hint = hints(groups).get(action.dest)
        if hint == bool | None:  # a bare --bf16 means true, as with plain booleans
            action.nargs, action.const = "?", True
        if action.dest == "resume_from_checkpoint":
            action.nargs, action.const = "?", NEWEST
        if takes_list(hint):
            action.__class__ = _Extend  # HfArgumentParser makes it a flag whose last occurrence wins
        if takes_auto(hint) and action.type is not None:
            action.type = _or_auto(action.type)
    parser.formatter_class = argparse.HelpFormatter
    return parser


def _or_auto(convert: Any) -> Callable[[str], Any]:
    def converted(text: str) -> Any:
        return text if text == AUTO else convert(text)

    converted.__name__ = getattr(convert, "__name__", str(convert))  # argparse names it where a value is wrong
    return converted


def _parse(parser: Parser, argv: Sequence[str]) -> dict[str, Any]:
    """Only the flags that were given, so that presets and files can fill in the others."""
    if {"-h", "--help"} & set(argv):
        for action in parser._actions:  # --max-length does what --max_length does; one of them is enough to read
            action.option_strings = [flag for flag in action.option_strings if "-" not in flag.lstrip("-")]
        parser.print_help()
        sys.exit(0)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    namespace, rest = parser.parse_known_args(list(argv))
    if rest:
        flag = next((a for a in rest if a.startswith("-")), rest[0]).split("=")[0]
        if not flag.startswith("-"):
            raise ConfigError(f"unknown argument {flag}")
        known = [action.dest for action in parser._actions if action.option_strings and action.dest != "help"]
        raise ConfigError(f"unknown flag {flag}{advice(flag, known, '--')}")
    return vars(namespace)


def _read_toml(name: str) -> dict[str, Any]:
    try:
        values = tomllib.loads(Path(name).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {name}: {error.strerror}") from None
    except ValueError as error:  # not UTF-8, not TOML
        raise ConfigError(f"--config {name}: not TOML: {error}") from None
    if twice := [key for key in values if "-" in key and key.replace("-", "_") in values]:
        raise ConfigError(f"--config {name}: {', '.join(twice)} is there twice, with - and with _; keep one")
    values = {key.replace("-", "_"): value for key, value in values.items()}
    known = {"preset": str, **hints(GROUPS)}
    if unknown := [f"unknown setting {key!r}{advice(key, known)}" for key in values if key not in known]:
        raise ConfigError(f"--config {name}: {'; '.join(unknown)}")
    return values
