"""What goes beside a run: its report, and its upload when it is whole. Neither can lose it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from softprompt.config.loader import TrainConfig
from softprompt.engines.data_parallel import DataParallelEngine
from softprompt.export.push_to_hub import check_hub, push
from softprompt.generation.generator import Generator, make_generator
from softprompt.prompt.adapter_io import PROMPT_KEY, json_bytes
from softprompt.prompt.nearest_tokens import embedding_space
from softprompt.report.collect import examples_of, facts_of, likeness, start_of
from softprompt.report.loss_plot import loss_picture
from softprompt.report.page import page
from softprompt.report.svg import INSTALL, installed
from softprompt.runs.file_names import FACTS_FILE, PICTURE_FILE, REPORT_FILE, START_FILE
from softprompt.runs.run_files import run_files
from softprompt.runs.run_reader import Facts, read_run
from softprompt.training.callbacks import RunCallbacks
from softprompt.training.result import Run
from softprompt.utils.errors import PushError
from softprompt.utils.shell_commands import argument, command

Say = Callable[[str], object]


class ReportAndPush:
    """An observer of a run (see training.run): writes its report, and uploads it with --push_to_hub. Neither can lose
    the run: what goes wrong is one line."""

    def __init__(self) -> None:
        self.facts: Facts = {}

    def check(self, config: TrainConfig, output_dir: Path) -> None:
        if config.sharing.push_to_hub:
            check_hub(config.sharing, output_dir, print)

    def begin(self, run: Run, callbacks: RunCallbacks) -> None:
        """Write down what is known of a run when its loop starts."""
        with _at_most_a_warning(FACTS_FILE, callbacks.log.say):
            self.facts |= facts_of(run, callbacks.arguments())
            run_files(run.output_dir).write({**start_of(run), FACTS_FILE: json_bytes(self.facts)})

    def end(self, run: Run, callbacks: RunCallbacks) -> Run:
        say = callbacks.log.say
        complete_report(run, self.facts, callbacks.world.size, say)
        return replace(run, not_pushed=pushed(run, say)) if run.config.sharing.push_to_hub else run


def complete_report(run: Run, facts: Facts, ranks: int, say: Say) -> None:
    """Write loss.png, complete report.json and write report.html, from the base that is in memory; what cannot be found
    out is left out and told there. A fault is one line, and nothing else of the run is touched."""
    folder, files, ended = run.output_dir, run_files(run.output_dir), {**facts, "end": {}}
    with _at_most_a_warning(FACTS_FILE, say):
        files.write({FACTS_FILE: json_bytes(ended)})
    with _at_most_a_warning(PICTURE_FILE, say):
        if picture := loss_picture(read_run(folder).history, run.before.loss if run.before else None):
            files.write({PICTURE_FILE: picture})
    with _at_most_a_warning(REPORT_FILE, say, f"; try: {command('report')} {argument(str(folder))}"):
        files.write({FACTS_FILE: json_bytes({**ended, "end": _found(run, ranks)})})
        files.write({REPORT_FILE: page([read_run(folder)]).encode()})
        more = "" if installed() else f"; without pictures, as matplotlib is not installed: {INSTALL}"
        say(f"report: {folder / REPORT_FILE}{more}")


@contextmanager
def _at_most_a_warning(what: str, say: Say, more: str = "") -> Iterator[None]:
    """Whatever goes wrong here, the run goes on, or has ended well."""
    try:
        yield
    except Exception as error:
        say(f"warning: no {what}: {_line(error)}; training is unaffected{more}")


def pushed(run: Run, say: Say) -> str | None:
    """Upload the run; why it is not there, where that failed."""
    try:
        say(f"on the hub: {push(run.output_dir, run.config.sharing)}")
    except PushError as error:
        return str(error)
    return None


def _found(run: Run, ranks: int) -> Facts:
    """Examples and likenesses, each of them or why it is left out."""
    setup = run.setup
    finders = {
        "examples": lambda: examples_of(run, _generator(run, ranks)),
        "likeness": lambda: likeness(
            embedding_space(setup.base), setup.data.tokenizer, setup.prompt.weight, _start(run)
        ),
    }
    found: Facts = {"left_out": []}
    for name, find in finders.items():
        try:
            found[name] = find()
        except Exception as error:  # memory, for one, may be short for it
            found["left_out"].append(f"No {name}: {_line(error)}")
    return found


def _generator(run: Run, ranks: int) -> Generator | None:
    """That of this process alone, as the other ranks have ended; none where the base is not in its memory."""
    if run.config.model.stream_base or (run.config.model.shard_base and ranks > 1):
        return None
    setup = run.setup
    engine = setup.engine.engine if isinstance(setup.engine, DataParallelEngine) else setup.engine
    return make_generator(engine, setup.base, setup.data.tokenizer)


def _start(run: Run) -> Tensor | None:
    file = run.output_dir / START_FILE
    return load_file(file)[PROMPT_KEY] if file.is_file() else None


def _line(error: Exception) -> str:
    what = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}{': ' if what else ''}{what}"
