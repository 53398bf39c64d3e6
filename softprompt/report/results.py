"""The metrics that a report shows as numbers, and the status of a run in words."""

from collections.abc import Iterator
from typing import NamedTuple

from softprompt.runs.run_reader import RunRecord
from softprompt.utils.metrics import METRICS, Metric, shown_metrics

DASH = "\N{WORD JOINER}–\N{WORD JOINER}"  # an en dash without a line break at it


# Metrics that are not shown, because the status or the notes on other metrics contain them.
LEFT_OUT = {"eval_samples", "eval_majority", "best_global_step"}
SHOWN = {name: metric for name, metric in METRICS.items() if name not in LEFT_OUT}
WHY_EARLY = {  # values of ended_early in report.json
    "early_stopping": "because the metric no longer improved (--early_stopping_patience)",
    "no_more_rows": "because the stream had fewer rows than expected",
}


class Result(NamedTuple):
    """A metric of a run as text: its value with the prompt, that of the base alone, and notes on the value."""

    metric: Metric
    value: str
    base: str | None
    notes: tuple[str, ...]


def results(record: RunRecord) -> dict[str, Result]:
    """Return the metrics that the run has, by their names in all_results.json."""
    return dict(_results(record))


def _results(record: RunRecord) -> Iterator[tuple[str, Result]]:
    known = shown_metrics(record.results or record.facts.get("base_alone", {}))
    for name, metric in ((name, metric) for name, metric in SHOWN.items() if name in known):
        value, base = record.final(name), record.of_base(name)
        if value is not None or base is not None:
            shown = "–" if value is None else metric.form.format(value)
            yield name, Result(metric, shown, None if base is None else metric.form.format(base), _notes(record, name))


def _notes(record: RunRecord, name: str) -> tuple[str, ...]:
    """Return the 95 % interval of a value, the accuracy of always giving the most common label, and the value with a
    text that the prompt replaces, whole or cut to the length of the prompt."""
    form = METRICS[name].form
    low, high = (record.results.get(f"{name}_{end}") for end in ("low", "high"))
    interval = () if low is None or high is None else (f"95 % interval {form.format(low)}{DASH}{form.format(high)}",)
    commonest = commonest_share(record) if name == "eval_accuracy" else None
    most = () if commonest is None else (f"most common label {form.format(commonest)}",)
    cut, whole = (record.results.get(f"{name}_{suffix}") for suffix in ("cut", "text"))
    of_cut = () if cut is None else (f"with the text cut {form.format(cut)}",)
    of_whole = () if whole is None else (f"with the whole text {form.format(whole)}",)
    return (*interval, *most, *of_cut, *of_whole)


def commonest_share(record: RunRecord) -> float | None:
    """Return the share of held-out rows that have the most common label; None if unknown."""
    return {**record.facts.get("base_alone", {}), **record.results}.get("eval_majority")


def status(record: RunRecord) -> str:
    """Return how far a run got, and why it ended early if that is known."""
    total = record.facts.get("total_steps")
    steps = f"step {record.steps:,} of {total:,}" if total else f"step {record.steps:,}"
    if not record.ended:
        state = "running now" if record.runs_now else "not finished"
        return f"{state}: its metrics end at {steps}" if record.steps else f"{state}: no step is logged yet"
    best = record.results.get("best_global_step")
    kept = f"; the saved prompt is the best one, from step {best:,}" if best is not None else ""
    if not total or record.steps >= total:
        return f"finished after {steps}{kept}"
    why = WHY_EARLY.get(record.facts.get("ended_early", ""), "")
    return f"ended early at {steps}, {why}{kept}" if why else f"ended early at {steps}{kept}"
