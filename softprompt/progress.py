"""What a running training shows and keeps: a bar over optimizer steps, metrics.jsonl, the history for pictures."""

import json
import sys
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from softprompt.trainer import Metrics, Step


class Progress:
    """A bar on a terminal; plain lines, one per log record, where there is none."""

    def __init__(self, total: int, metrics_file: Path, stream: TextIO | None = None):
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.total = total
        self.bar: tqdm = tqdm(disable=True)
        self.metrics_file = metrics_file
        self.history: list[Metrics] = []
        self.steps: list[Step] = []

    def start(self) -> None:
        """Make the run's folder and an empty metrics.jsonl; show the bar."""
        self.metrics_file.parent.mkdir(parents=True, exist_ok=True)
        self.metrics_file.write_text("", encoding="utf-8")
        self.bar = tqdm(total=self.total, unit="step", desc="training", file=self.stream, disable=not self.live)

    def on_step(self, step: Step) -> None:
        self.steps.append(step)
        recent = self.steps[-10:]
        speed = sum(s.tokens for s in recent) / sum(s.seconds for s in recent)
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

    @property
    def mean_loss(self) -> float:
        """Mean over steps of their losses, Trainer's train_loss."""
        return sum(s.loss for s in self.steps) / len(self.steps)

    @property
    def tokens_per_second(self) -> float:
        """Real tokens over the seconds spent in optimizer steps."""
        return sum(s.tokens for s in self.steps) / sum(s.seconds for s in self.steps)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)
