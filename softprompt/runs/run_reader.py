"""Read the folder of a run, whether the run has ended or not."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from softprompt.prompt.file_names import CONFIG_FILE
from softprompt.runs.checkpoints import checkpoints, newest_whole
from softprompt.runs.file_names import FACTS_FILE, METRICS_FILE, RESULTS_FILE, STATE_FILE
from softprompt.runs.state import Metrics
from softprompt.utils.atomic_io import read_inside
from softprompt.utils.errors import ReportError
from softprompt.utils.file_lock import FolderLock
from softprompt.utils.named_folders import check_run_folder

Facts = dict[str, Any]
MAX_BYTES = 256 << 20  # the largest file that is read


@dataclass(frozen=True)
class RunRecord:
    """The content of a run's folder.

    Attributes:
        facts: The content of report.json; empty if an older version wrote none.
        history: The records of metrics.jsonl, with only those values that are finite numbers. It is empty only if the
            run goes on and has not logged a step.
        results: The content of all_results.json; empty if the run has not ended.
        runs_now: Whether a process is writing into the folder.
        checkpoint: The newest complete checkpoint of a run that has not ended; None if there is none.
    """

    folder: Path
    facts: Facts
    history: list[Metrics]
    results: Metrics = field(default_factory=dict)
    runs_now: bool = False
    checkpoint: str | None = None

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.folder.name or self.folder.resolve().name

    @property
    def steps(self) -> int:
        """The number of the last logged step; 0 if none is logged."""
        return max((record["step"] for record in self.history), default=0)

    @property
    def ended(self) -> bool:
        """Whether the run has ended."""
        return "end" in self.facts if "prompt" in self.facts else bool(self.results)

    @property
    def arguments(self) -> Facts:
        """The settings of the run, by the names of the flags; empty if they are unknown."""
        return self.facts.get("arguments", {})

    def series(self, name: str) -> list[tuple[int, float]]:
        """Return the (step, value) points of a metric, without records of step 0."""
        return [(record["step"], record[name]) for record in self.history if name in record and record["step"]]

    def of_base(self, name: str) -> float | None:
        """Return a metric of the bare base, such as eval_loss."""
        return {**self.results, **self.facts.get("base_alone", {})}.get(f"{name}_base")

    def final(self, name: str) -> float | None:
        """Return a metric of the final prompt; if the run has not ended, the metric's last value so far."""
        points = self.series(name)
        return self.results.get(name) if self.ended else points[-1][1] if points else None


def read_run(folder: str | Path) -> RunRecord:
    """Read a run's folder. The run may still be in progress.

    Raises:
        ReportError: The folder does not exist, holds no run or no metrics yet, or has a file that cannot be read.
    """
    folder = Path(folder)
    check_run_folder(folder)
    if (folder / STATE_FILE).exists() and folder.name.startswith("checkpoint-") and not checkpoints(folder):
        raise ReportError(f"{folder}: is a checkpoint; name its run, {folder.parent}")
    known = (FACTS_FILE, RESULTS_FILE, METRICS_FILE)
    if not any((folder / name).exists() for name in known) and not checkpoints(folder):
        kind = "an adapter, and no run of train.py" if (folder / CONFIG_FILE).exists() else "no run of train.py"
        raise ReportError(f"{folder}: holds {kind} (none of {', '.join(known)}); name the OUTPUT_DIR of a run")
    history = _read(folder, METRICS_FILE, _lines)
    if history is None:
        raise ReportError(f"{folder}: has no metrics: {METRICS_FILE} is missing; name the OUTPUT_DIR of a run")
    facts, results = (_read(folder, name, _object) or {} for name in (FACTS_FILE, RESULTS_FILE))
    record = RunRecord(folder, facts, history, _numbers(results))
    runs_now = (not record.ended or not history) and FolderLock(folder).is_held()
    if not history and not (runs_now and facts):
        why = "look again after --logging_steps" if runs_now else "the run stopped before it logged a step; train again"
        raise ReportError(f"{folder}: has no metrics yet: {METRICS_FILE} is empty; {why}")
    if record.ended:
        return record
    whole = newest_whole(folder)
    return RunRecord(folder, facts, history, {}, runs_now, whole and whole.name)


def _lines(text: str) -> list[Metrics]:
    """Parse metrics.jsonl. The last line may be incomplete if the run was killed while writing it."""
    lines, records = text.split("\n"), []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            if number == len(lines):
                break
            raise ValueError(f"line {number}: not JSON") from None
        if record is not None and not (isinstance(record, dict) and type(record.get("step")) is int):
            raise ValueError(f"line {number}: expected an object with a step")
        records += [_numbers(record)] if record else []
    return records


def _object(text: str) -> Facts:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("expected an object")
    return value


def _numbers(record: Metrics) -> Metrics:
    return {n: v for n, v in record.items() if type(v) in (int, float) and math.isfinite(v)}


def _read(folder: Path, name: str, parse: Callable[[str], Any]) -> Any:
    """Read and parse a file; None if it does not exist."""
    try:
        return parse(read_inside(folder, name, MAX_BYTES).decode("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:160]
        raise ReportError(f"{folder / name}: cannot be read: {reason}") from None
