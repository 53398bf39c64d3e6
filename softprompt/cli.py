"""The command line: one function for each command. Every error becomes one line on stderr and an exit code.

`softprompt COMMAND …` and `python -m softprompt COMMAND …` offer all commands; the scripts train.py and infer.py call
`train` and `infer`. Importing this module does not import torch, so that --help and errors in flags appear at once.
"""

import argparse
import errno
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from softprompt.config.adapter_specs import check_adapter_specs
from softprompt.config.arg_parser import FlagParser
from softprompt.config.command_line import parse_chat, parse_inference, parse_training
from softprompt.config.help_text import HelpFormatter, examples_text
from softprompt.config.unknown_names import advice
from softprompt.export.args import parse_export
from softprompt.export.push_args import parse_push
from softprompt.report.args import parse_report
from softprompt.serving.args import parse_roots, parse_serve
from softprompt.study.grid import parse_study
from softprompt.utils.errors import ConfigError, OtherRankError, PushError, SoftpromptError, Stopped
from softprompt.utils.named_folders import check_adapter_folder, check_run_folder
from softprompt.utils.redact import redacted
from softprompt.utils.shell_commands import program_name
from softprompt.utils.std_streams import answers_on_stdout, discard_buffer, reopen_closed_streams, tolerant_streams
from softprompt.utils.torchrun_env import is_distributed, is_main, may_restart
from softprompt.utils.translation import FLAG, HELP, LANGUAGES, choose_language, translate, translate_error

EXAMPLES = (
    ("Learn a first prompt, without network", "train"),
    ("Ask it", 'infer --prompt "我爱这部电影"'),
    ("Find out what this machine lacks", "doctor"),
)


def train(argv: Sequence[str]) -> None:
    """Learn a soft prompt for a frozen language model, or print what the run would cost (`--dry_run`).

    Raises:
        PushError: The run is complete, but `--push_to_hub` failed.
        SoftpromptError: The run failed or was stopped.
    """
    config = parse_training(argv)

    from softprompt.api import run_and_report
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
    """Answer one question or a file of questions, evaluate adapters, or, without either, chat on the terminal."""
    config = parse_inference(argv)
    check_adapter_specs(config.model.adapter)

    from softprompt.inference import infer

    infer(config)


def chat(argv: Sequence[str]) -> None:
    """Hold a conversation on the terminal."""
    config = parse_chat(argv)
    check_adapter_specs(config.model.adapter)

    from softprompt.inference import chat

    chat(config)


def export(argv: Sequence[str]) -> None:
    """Write a base and its learned prompt as one plain transformers model, or a prompt for vLLM."""
    adapter, arguments = parse_export(argv)
    check_adapter_folder(adapter)

    from softprompt.export.plain_model import write_export

    print(write_export(adapter, arguments))


def push(argv: Sequence[str]) -> None:
    """Upload a finished run to the hub.

    Raises:
        PushError: The upload failed.
    """
    folder, sharing = parse_push(argv)
    check_run_folder(folder)

    from softprompt.export.push_to_hub import push_finished_run

    print(push_finished_run(folder, sharing))


def report(argv: Sequence[str]) -> None:
    """Write one HTML page about one run, or about several runs side by side."""
    request = parse_report(argv)
    for run in request.runs:
        check_run_folder(run)

    from softprompt.report.watch import watch
    from softprompt.report.writer import write_report

    if request.watch:
        path = watch(request.runs, request.output_file, lambda line: print(line, file=sys.stderr, flush=True))
    else:
        path = write_report(request.runs, request.output_file)
    print(path)


def study(argv: Sequence[str]) -> None:
    """Train every cell of a grid of settings, and report what the results show."""
    plan = parse_study(argv)

    from softprompt.study.study import run_study

    run_study(plan)


def serve(argv: Sequence[str]) -> None:
    """Serve a base and its adapters over HTTP, with an OpenAI-compatible API.

    Raises:
        ConfigError: FastAPI or uvicorn is not installed.
    """
    config = parse_serve(argv)
    parse_roots(config.server.adapters)

    if missing := [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]:
        install = "pip install fastapi uvicorn (or pip install -e '.[serve]')"
        raise ConfigError(f"serve needs {' and '.join(missing)}, which this Python lacks: {install}")

    from softprompt.serving.server import serve

    serve(config)


def doctor(argv: Sequence[str]) -> None:
    """Say what this machine has, what a run would use, and what is missing."""
    description = "Say what this machine has, what a run would use, and what is missing."
    FlagParser([], "doctor", description, usage="[--help]", examples=[("Examine this machine", "")]).parse(argv)

    from softprompt.doctor import examine, report

    findings = examine()
    print(report(findings))
    if any(finding.advice and finding.required for finding in findings):
        raise ConfigError("something that every run needs is missing; do what is listed above under Needed")


class Command(NamedTuple):
    """A command, its line in `softprompt --help`, and whether its result is what it prints (see `run_command`)."""

    run: Callable[[Sequence[str]], None]
    help: str
    prints_answers: bool = False


COMMANDS = {
    "train": Command(train, "learn a soft prompt for a frozen language model (as train.py does)"),
    "infer": Command(infer, "answer questions with a learned prompt, or evaluate prompts (as infer.py does)", True),
    "chat": Command(chat, "hold a conversation on the terminal", True),
    "export": Command(export, "write a base and its learned prompt as one plain transformers model"),
    "push": Command(push, "upload a finished run to the Hugging Face hub"),
    "report": Command(report, "write one HTML page about one run, or about several runs side by side"),
    "study": Command(study, "train every cell of a grid of settings, and report what the results show"),
    "serve": Command(serve, "serve a base and its adapters over HTTP, with an OpenAI-compatible API"),
    "doctor": Command(doctor, "say what this machine has, what a run would use, and what is missing"),
}


def main() -> NoReturn:
    """Run the command that the command line names, and exit."""
    name = next((word for word in sys.argv[1:] if word in COMMANDS), "")  # after --lang, if that comes first
    run_command(_dispatch, prints_answers=name in COMMANDS and COMMANDS[name].prints_answers)


def _dispatch(argv: Sequence[str]) -> None:
    name, *rest = argv or ["--help"]
    if name in COMMANDS:
        COMMANDS[name].run(rest)
    elif name in ("-h", "--help", "help"):
        _overview().print_help()
    else:
        raise ConfigError(f"unknown command {name}{advice(name, COMMANDS)}; expected one of {', '.join(COMMANDS)}")


def _overview() -> argparse.ArgumentParser:
    """Return a parser whose help lists the commands; each command parses its own flags."""
    program = program_name("").strip()
    examples = examples_text(program, EXAMPLES)
    parser = argparse.ArgumentParser(
        prog=program,
        description=translate("Prompt tuning of frozen language models."),
        epilog="\n\n".join([translate(f"`{program} COMMAND --help` explains the flags of a command."), examples]),
        usage=f"{program} COMMAND [--flag value …]",
        formatter_class=HelpFormatter,
        add_help=False,
    )
    parser._optionals.title = translate("options")
    parser.add_argument("-h", "--help", action="help", help=translate("show this help message and exit"))
    parser.add_argument(FLAG, choices=LANGUAGES, help=translate(HELP))
    commands = parser.add_subparsers(title=translate("commands"), metavar="COMMAND")
    for name, known in COMMANDS.items():
        commands.add_parser(name, help=translate(known.help))
    return parser


def run_command(
    main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None, prints_answers: bool = False
) -> NoReturn:
    """Run `main`, print an error as one line on stderr, and exit with 0 or the error's code.

    Args:
        main: A command of this module.
        argv: Its arguments, by default those of the process.
        prints_answers: Whether what it prints is its result. If so, the command ends when stdout is closed by its
            reader; otherwise it continues without printing.
    """
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
        main(choose_language(argv))
        sys.stdout.flush()
    except Stopped as stop:
        if is_main():
            print(translate(str(stop)), file=sys.stderr)
        _leave(0 if may_restart() else stop.exit_code)  # torchrun would restart a run that was asked to stop
    except SoftpromptError as error:
        run_is_whole = isinstance(error, PushError) and may_restart()  # torchrun would train it again
        met_by_all = error.exit_code == 2 or isinstance(error, OtherRankError)
        _exit(str(error), 0 if run_is_whole else error.exit_code, met_by_all)
    except KeyboardInterrupt:
        _exit("stopped", 130)
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has read enough
        sys.exit(0)
    except Exception as error:
        if isinstance(error, OSError) and error.filename and not hasattr(error, "output_dir"):  # before a run began
            _exit(f"{error.filename}: {error.strerror}", 2 if error.errno == errno.ENAMETOOLONG else 1)
        from softprompt.runs.crash_report import crash_line

        _exit(crash_line(error), 1)
    sys.exit(0)


def _exit(message: str, code: int, met_by_all: bool = False) -> NoReturn:
    """Print an error and exit. An error that all ranks of torchrun have (`met_by_all`) is printed only by rank 0."""
    if is_main() or not met_by_all:
        print(translate_error(redacted(" ".join(message.split()))), file=sys.stderr)
    _leave(code)


def _leave(code: int) -> NoReturn:
    """Exit. One of several ranks exits without the interpreter's cleanup, during which the threads of its connections
    might abort."""
    if is_distributed():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
