"""What a running training shows and keeps: a bar over optimizer steps, metrics.jsonl, the history for pictures."""

import json
import sys
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from softprompt.files import write_files
from softprompt.trainer import Metrics, Step


@dataclass(frozen=True)
class Totals:
    """Sums over all steps of a run, a resumed one's earlier ones among them; `seconds` are those spent in
    steps, `runtime` those of the whole loop up to a checkpoint."""

    steps: int = 0
    epoch: float = 0.0
    loss: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    runtime: float = 0.0

    def plus(self, step: Step) -> "Totals":
        return replace(
            self,
            steps=step.number,
            epoch=step.epoch,
            loss=self.loss + step.loss,
            tokens=self.tokens + step.tokens,
            seconds=self.seconds + step.seconds,
        )

    @property
    def mean_loss(self) -> float:
        """Mean over steps of their losses, Trainer's train_loss."""
        return self.loss / self.steps

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


class Progress:
    """A bar on a terminal; plain lines, one per log record, where there is none."""

    def __init__(self, total: int, metrics_file: Path, stream: TextIO | None = None):
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.total = total
        self.bar: tqdm = tqdm(disable=True)
        self.metrics_file = metrics_file
        self.history: list[Metrics] = []
        self.recent: deque[Step] = deque(maxlen=10)
        self.totals = Totals()

    def start(self, totals: "Totals | None" = None) -> None:
        """Make the run's folder and its metrics.jsonl, empty, or with the records up to where a resumed run goes on;
        show the bar."""
        self.totals = totals or self.totals
        self.metrics_file.parent.mkdir(parents=True, exist_ok=True)
        self.history = self._records_so_far()
        lines = "".join(json.dumps(record) + "\n" for record in self.history)
        write_files(self.metrics_file.parent, {self.metrics_file.name: lines.encode()})
        self.bar = tqdm(
            total=self.total,
            initial=self.totals.steps,
            unit="step",
            desc="training",
            file=self.stream,
            disable=not self.live,
        )

    def _records_so_far(self) -> list[Metrics]:
        """Every record up to the step that a resumed run goes on from, but for a finished run's last evaluation."""
        done, records = self.totals.steps, []
        if not done or not self.metrics_file.exists():
            return []
        for line in self.metrics_file.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                record = json.loads(line)
                last_evaluation = record["step"] == self.total and "eval_loss" in record
                if record["step"] <= done and not last_evaluation:
                    records.append(record)
            except (ValueError, KeyError, TypeError):
                continue  # the line that was being written when the run was killed
        return records

    def on_step(self, step: Step) -> None:
        self.totals = self.totals.plus(step)
        self.recent.append(step)
        speed = sum(s.tokens for s in self.recent) / sum(s.seconds for s in self.recent)
        shown = {"loss": f"{step.loss:.4f}", "lr": f"{step.learning_rate:.2e}", "tok/s": f"{speed:,.0f}"}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(1)

    def on_log(self, record: Metrics) -> None:
        """Append one record to metrics.jsonl; a log that cannot be written is no reason to lose a run."""
        self.history.append(record)
        try:
            with open(self.metrics_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")
        except OSError as error:
            self.say(f"warning: {self.metrics_file} cannot be written ({error.strerror}); training goes on")
        if not self.live or "eval_loss" in record:
            self.say("  ".join(f"{name} {_short(value)}" for name, value in record.items() if value is not None))

    def say(self, text: str) -> None:
        """One line that does not disturb the bar."""
        tqdm.write(text, file=self.stream)
        self.stream.flush()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)
