"""Show and store the metrics of a running training: a progress bar, metrics.jsonl, TensorBoard."""

import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from tqdm.auto import tqdm

from softprompt.runs.checkpoints import metrics_file
from softprompt.runs.manifest import Manifest
from softprompt.runs.state import Metrics, Step
from softprompt.training.tensorboard import TensorBoardLog
from softprompt.utils.progress import log_stream, progress_bar, show_fields, shows_bars
from softprompt.utils.redact import redacted
from softprompt.utils.std_streams import null_stream
from softprompt.utils.translation import translate


@dataclass(frozen=True)
class Totals:
    """Sums over all steps of a run, including those before a resume.

    Attributes:
        steps, epoch: Number of the last step, and the epoch after it.
        loss: Sum of the finite losses.
        tokens: Number of tokens, without padding and virtual tokens.
        seconds: Time spent in optimizer steps.
        runtime: Seconds of the whole loop, evaluations included, up to the last checkpoint.
        without_loss: Number of steps whose loss was not finite.
    """

    steps: int = 0
    epoch: float = 0.0
    loss: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    runtime: float = 0.0
    without_loss: int = 0

    def plus(self, step: Step) -> "Totals":
        """Return the sums with one more step."""
        return replace(
            self,
            steps=step.number,
            epoch=step.epoch,
            loss=self.loss + (step.loss or 0.0),
            without_loss=self.without_loss + (step.loss is None),
            tokens=self.tokens + step.tokens,
            seconds=self.seconds + step.seconds,
        )

    @property
    def mean_loss(self) -> float | None:
        """The mean of all finite losses, Trainer's train_loss; None if no step has one."""
        counted = self.steps - self.without_loss
        return self.loss / counted if counted else None

    @property
    def tokens_per_second(self) -> float:
        """Real tokens per second of time spent in optimizer steps."""
        return self.tokens / self.seconds


class MetricsLog:
    """Shows a progress bar on a terminal or in a notebook, or one plain line per log record elsewhere, and appends to
    metrics.jsonl."""

    def __init__(
        self, total: int, metrics_file: Path, stream: TextIO | None = None, board: TensorBoardLog | None = None
    ):
        self.stream = stream or log_stream()
        self.live = self.stream.isatty() if stream else shows_bars()
        self.total = total
        self.bar: tqdm[Any] = tqdm(disable=True)
        self.metrics_file, self.board = metrics_file, board
        self.history: list[Metrics] = []
        self.recent: deque[Step] = deque(maxlen=10)
        self.totals = Totals()
        self.behind = False  # whether metrics.jsonl lacks records that could not be written

    def start(self, totals: Totals | None = None, history: Sequence[Metrics] = ()) -> None:
        """Rewrite metrics.jsonl with `history`, the records from before a resume, and show the progress bar."""
        self.totals = totals or self.totals
        self.history = list(history)
        self._write(self._write_whole)
        if self.board:
            self.board.start(self.history, self.totals.steps, self.say)
        shown = {"initial": self.totals.steps, "file": self.stream, "disable": not self.live}
        self.bar = progress_bar(self.total, "training", "step", delay=0, leave=True, **shown)

    def on_step(self, step: Step) -> None:
        """Add a step to the totals, and show it in the progress bar."""
        self.totals = self.totals.plus(step)
        self.recent.append(step)
        speed = sum(s.tokens for s in self.recent) / sum(s.seconds for s in self.recent)
        loss = "not finite" if step.loss is None else f"{step.loss:.4f}"
        fields = {"loss": loss, "tok/s": f"{speed:,.0f}", "lr": f"{step.learning_rate:.2e}"}
        if self.live:
            self._show(lambda: show_fields(self.bar, fields))
        self._show(lambda: self.bar.update(1))

    def on_log(self, record: Metrics) -> None:
        """Append a record to metrics.jsonl. Print it if there is no progress bar or if it is an evaluation."""
        self.history.append(record)
        if self.board:
            self.board.log(record)
        self._write(self._write_whole if self.behind else lambda: self._append(record))
        if not self.live or "eval_loss" in record:
            self._print("  ".join(f"{name} {_short(value)}" for name, value in record.items() if value is not None))

    def on_end(self, results: Metrics) -> None:
        """Send the results that are known only at the end to TensorBoard. They are not added to metrics.jsonl."""
        known = {name: v for name, v in results.items() if name.startswith("train_") or name.endswith("_base")}
        if self.board:
            self.board.log({"step": self.totals.steps, **known})

    def say(self, text: str) -> None:
        """Print a message without disturbing the bar."""
        self._print(translate(text))

    def _print(self, line: str) -> None:
        self._show(lambda: tqdm.write(redacted(line), file=self.stream))
        self._show(self.stream.flush)

    def _write_whole(self) -> None:
        Manifest(self.metrics_file.parent).write({self.metrics_file.name: metrics_file(self.history)})

    def _append(self, record: Metrics) -> None:
        with open(self.metrics_file, "ab") as file:
            file.write(metrics_file([record]))

    def _write(self, write: Callable[[], None]) -> None:
        """Call `write`, but do not end the run if it fails: missing records are written once writing works again."""
        try:
            write()
            self.behind = False
        except OSError as error:
            if not self.behind:
                self.say(f"warning: {self.metrics_file} cannot be written ({error.strerror}); training goes on")
            self.behind = True

    def _show(self, show: Callable[[], object]) -> None:
        """Call `show`, but do not end the run if the terminal is gone or the pipe's reader has closed it."""
        try:
            show()
        except (OSError, ValueError):
            instead = null_stream()
            if self.stream is sys.stderr:
                sys.stderr = instead  # flushing its buffer would fail again at exit
            self.stream = instead
            self.bar.disable = True

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self._show(self.bar.close)
        if self.board:
            self.board.close()


class SilentMetricsLog(MetricsLog):
    """The log of a rank other than 0: it only keeps totals and history."""

    def __init__(self, total: int):
        super().__init__(total, Path(os.devnull), null_stream())

    def _write(self, write: Callable[[], None]) -> None: ...


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)
