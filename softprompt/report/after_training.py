"""Write the report of a run, and upload the run. If one of them fails, the error is printed and the run is kept."""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from softprompt.config.loader import TrainConfig
from softprompt.engines.data_parallel import DataParallelEngine
from softprompt.export.push_to_hub import check_hub, push
from softprompt.generation.generator import Generator, make_generator
from softprompt.prompt.adapter_io import PROMPT_KEY, json_bytes
from softprompt.prompt.file_names import CARD_FILE
from softprompt.prompt.nearest_tokens import embedding_space
from softprompt.prompt.public_names import is_local, public_name
from softprompt.report.collect import (
    confusion_facts,
    example_answers,
    initial_prompt_file,
    run_facts,
    wrong_answers,
)
from softprompt.report.nearest_words import describe_prompt
from softprompt.report.page import page
from softprompt.runs.file_names import FACTS_FILE, PICTURE_FILE, REPORT_FILE, START_FILE
from softprompt.runs.manifest import Manifest
from softprompt.runs.run_card import run_card
from softprompt.runs.run_reader import Facts, read_run
from softprompt.runs.state import Metrics
from softprompt.training.callbacks import RunCallbacks
from softprompt.training.final_metrics import verdict_facts
from softprompt.training.loss_curves import draw_loss_curves
from softprompt.training.result import Run
from softprompt.training.run import Observer
from softprompt.utils.errors import PushError
from softprompt.utils.shell_commands import argument, command

Say = Callable[[str], object]


class ReportAndPush(Observer):
    """Writes the report of a run, and uploads the run with `--push_to_hub`."""

    def __init__(self) -> None:
        self.facts: Facts = {}

    def check(self, config: TrainConfig, output_dir: Path) -> None:
        """Before training, check that the run can be uploaded if `--push_to_hub` is given.

        Raises:
            ConfigError: The run cannot be uploaded (see `check_hub`).
        """
        if config.sharing.push_to_hub:
            check_hub(config.sharing, output_dir)
            if is_local(base := config.model.model_name_or_path):
                print(
                    f"--push_to_hub: the base is a local folder; it is published as {public_name(base)}, without path"
                )

    def begin(self, run: Run, callbacks: RunCallbacks) -> None:
        """Write what is known when training starts: report.json and the initial prompt."""
        with _warning_on_error(FACTS_FILE, callbacks.log.say):
            self.facts |= run_facts(run, callbacks.arguments())
            Manifest(run.output_dir).write({**initial_prompt_file(run), FACTS_FILE: json_bytes(self.facts)})

    def end(self, run: Run, callbacks: RunCallbacks) -> Run:
        """Complete the report, upload the run if `--push_to_hub` is given, and return the run; `not_pushed` says why an
        upload failed."""
        say = callbacks.log.say
        self.facts |= {"ended_early": callbacks.ended_early}
        complete_report(run, self.facts, callbacks.world.size, say)
        return replace(run, not_pushed=upload(run, say)) if run.config.sharing.push_to_hub else run


def complete_report(run: Run, facts: Facts, ranks: int, say: Say) -> None:
    """Write loss.png, complete report.json and the model card, and write report.html, using the base in memory.

    The page names each part that was left out because of an error. If a file cannot be written, a warning is printed.

    Args:
        run: The finished run.
        facts: The content of report.json so far.
        ranks: Number of ranks that trained. The others have exited, so a sharded base is incomplete.
        say: Called with each line to print.
    """
    folder, files, ended = run.output_dir, Manifest(run.output_dir), {**facts, "end": {}}
    with _warning_on_error(FACTS_FILE, say):
        files.write({FACTS_FILE: json_bytes(ended)})
    with _warning_on_error(PICTURE_FILE, say):
        if plot := loss_plot(read_run(folder).history, run.before.loss if run.before else None):
            files.write({PICTURE_FILE: plot})
    with _warning_on_error(REPORT_FILE, say, f"; try: {command('report')} {argument(str(folder))}"):
        files.write({FACTS_FILE: json_bytes({**ended, "end": _end_facts(run, ranks)})})
        files.write({REPORT_FILE: page([read_run(folder)]).encode()})
        with _warning_on_error(CARD_FILE, say):
            files.write({CARD_FILE: run_card(read_run(folder))})
        say(f"report: {folder / REPORT_FILE}")


@contextmanager
def _warning_on_error(what: str, say: Say, more: str = "") -> Iterator[None]:
    """Print a warning that `what` was not written instead of raising an error."""
    try:
        yield
    except Exception as error:
        say(f"warning: no {what}: {_line(error)}; training is unaffected{more}")


def upload(run: Run, say: Say) -> str | None:
    """Upload the run. Return the reason if that failed, else None."""
    try:
        say(f"on the hub: {push(run.output_dir, run.config.sharing)}")
    except PushError as error:
        return str(error)
    return None


def _end_facts(run: Run, ranks: int) -> Facts:
    """Return whether the prompt is useful, the confusion matrices, wrong and example answers, and the prompt's nearest
    words, or why each is left out. What does not apply is left out without a reason."""
    setup = run.setup
    prompt, tokenizer = setup.prompt.weight, setup.data.tokenizer
    parts: dict[str, tuple[str, Callable[[], Any]]] = {
        "confusion": ("confusion matrix", lambda: confusion_facts(run)),
        "wrong": ("wrong answers", lambda: wrong_answers(run)),
        "examples": ("examples", lambda: example_answers(run, _generator(run, ranks))),
        "likeness": (
            "nearest words",
            lambda: describe_prompt(embedding_space(setup.base), tokenizer, prompt, _initial_prompt(run)),
        ),
    }
    found: Facts = {**verdict_facts(run.verdict), "left_out": []}
    for key, (name, collect) in parts.items():
        try:
            if (facts := collect()) is not None:
                found[key] = facts
        except Exception as error:  # out of memory, for example
            found["left_out"].append(f"No {name}: {_line(error)}")
    return found


def _generator(run: Run, ranks: int) -> Generator | None:
    """Return a generator that works without the other ranks, which have exited; None if this rank does not hold the
    whole base."""
    if run.config.model.stream_base or (run.config.model.shard_base and ranks > 1):
        return None
    setup = run.setup
    engine = setup.engine.engine if isinstance(setup.engine, DataParallelEngine) else setup.engine
    return make_generator(engine, setup.base, setup.data.tokenizer)


def _initial_prompt(run: Run) -> Tensor | None:
    file = run.output_dir / START_FILE
    return load_file(file)[PROMPT_KEY] if file.is_file() else None


def _line(error: Exception) -> str:
    what = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}{': ' if what else ''}{what}"


def loss_plot(history: Sequence[Metrics], eval_loss_base: float | None) -> bytes | None:
    """Return a PNG of `loss_curves.draw_loss_curves`, or None if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    draw_loss_curves(figure.subplots(), history, eval_loss_base)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()
