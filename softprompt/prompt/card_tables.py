"""Markdown tables of a model card: metrics, answers before and after, the curve, settings."""

import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from softprompt.data.template import without_default_template
from softprompt.utils.metrics import METRICS, Metric, shown_metrics

MAX_CHARACTERS = 160  # maximum length of a text in a table
MAX_POINTS = 10  # maximum number of rows of the curve's table
BAR = 20  # length of the longest bar in characters


CURVES = {  # the columns of the curve and how they are shown; None: as in METRICS
    "loss": Metric("training loss", "{:.4f}"),
    "eval_loss": None,
    "eval_kl": None,
    "eval_agreement": None,
    "eval_accuracy": None,
    "eval_exact_match": None,
}
OTHERS = {"_cut": "text cut", "_text": "whole text"}  # columns of a distilled prompt, by the suffix of metrics


def metrics_table(metrics: Mapping[str, Any]) -> list[str]:
    """Return a table of the metrics that are numbers: each with that of the base alone, whose name ends in _base, its
    95 % interval, the ends of which are named _low and _high, and with distillation that of the cut text (_cut) and of
    the whole text (_text)."""
    numbers = {name: value for name, value in metrics.items() if type(value) in (int, float) and name != "epoch"}
    names = dict.fromkeys(re.sub("_(base|low|high|cut|text)$", "", name) for name in numbers)
    shown = shown_metrics(names)
    known = [name for name in shown if name in names]
    others = [suffix for suffix in OTHERS if any(f"{name}{suffix}" in numbers for name in names)]
    rows = []
    for name in (*known, *(name for name in names if name not in METRICS)):
        metric = METRICS.get(name, Metric(name.removeprefix("eval_").replace("_", " "), "{:.6g}"))
        base, value, *ends = (_number(numbers.get(name + end), metric.form) for end in ("_base", "", "_low", "_high"))
        more = [_number(numbers.get(name + suffix), metric.form) for suffix in others]
        rows.append((metric.label, base, *more, f"{value} ({'–'.join(ends)})" if all(ends) else value))
    intervals = " (95 % interval)" if any(f"{name}_low" in numbers for name in names) else ""
    return table(("", "base alone", *(OTHERS[suffix] for suffix in others), f"with the prompt{intervals}"), rows)


def examples_table(examples: Sequence[Mapping[str, Any]], compared: bool, expected: str = "expected") -> list[str]:
    """Return a table of rows with their answers before and after training. `compared` says whether an answer is right
    only if it equals the expected one, so that it can be marked. `expected` is the title of its column."""

    def answer(row: Mapping[str, str], key: str) -> str:
        right = row.get(f"correct_{key}", row[key].strip() == row["expected"].strip())  # None: it is not known
        mark = "" if not compared or right is None else "✓ " if right else "✗ "
        return mark + text_cell(row[key])

    rows = [
        (
            text_cell(without_default_template(row["question"])),
            text_cell(row["expected"]),
            answer(row, "before"),
            answer(row, "after"),
        )
        for row in examples
    ]
    return table(("input", expected, "base alone", "with the prompt"), rows)


def curve_table(history: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a table of at most MAX_POINTS points of the run, with bars that show the first loss column on a log
    scale."""
    by_step: dict[int, dict[str, Any]] = {}
    for record in history:
        if record["step"]:
            known = {name: value for name, value in record.items() if value is not None}
            by_step.setdefault(record["step"], {}).update(known)
    points = _chosen(sorted(by_step.items()))
    shown = shown_metrics({name for _, point in points for name in point})
    names = [n for n in CURVES if (n in shown or n == "loss") and any(n in point for _, point in points)]
    if len(points) < 2 or not names:
        return []
    bars = _log_bars([point.get(names[0], 0.0) for _, point in points])
    labels = [(CURVES[name] or METRICS[name]).label for name in names]
    rows = [
        (f"{step:,}", *(_number(point.get(name), (CURVES[name] or METRICS[name]).form) for name in names), bar)
        for (step, point), bar in zip(points, bars, strict=True)
    ]
    return table(("step", *labels, f"{labels[0].partition(',')[0]}, log scale"), rows)


def _chosen(points: Sequence[tuple[int, Mapping[str, Any]]]) -> list[tuple[int, Mapping[str, Any]]]:
    """Return at most MAX_POINTS points: those with an evaluation, and others between them, evenly spaced."""
    evaluated = [i for i, (_, point) in enumerate(points) if "eval_loss" in point]
    some = _spaced(evaluated, MAX_POINTS)
    others = [i for i in range(len(points)) if i not in evaluated]
    return [points[i] for i in sorted([*some, *_spaced(others, MAX_POINTS - len(some))])]


def _spaced(values: Sequence[int], n: int) -> list[int]:
    """Return at most `n` of the values, evenly spaced, the first and the last among them."""
    if len(values) <= n:
        return list(values)
    return [values[round(i * (len(values) - 1) / (n - 1))] for i in range(n)] if n > 1 else list(values[:n])


def _log_bars(values: Sequence[float]) -> list[str]:
    logs = [math.log(value) if value > 0 else None for value in values]
    known = [each for each in logs if each is not None]
    low, span = min(known, default=0.0), (max(known, default=0.0) - min(known, default=0.0)) or 1.0
    return ["" if each is None else "█" * (1 + round((BAR - 1) * (each - low) / span)) for each in logs]


def settings_table(settings: Mapping[str, Any]) -> list[str]:
    """Return a table of settings; those that are None are left out."""
    rows = [(name, value_cell(value)) for name, value in settings.items() if value is not None]
    return table(("setting", "value"), rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table and an empty one; nothing if there are no rows."""
    if not rows:
        return []
    return [_line(head), _line(["---"] * len(head)), *map(_line, rows), ""]


def text_cell(text: str) -> str:
    """Return the beginning of a text on one line, with everything escaped that Markdown or HTML would interpret."""
    text = " ".join(text.split())
    text = text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1] + "…"
    return re.sub(r"([\\`*_\[\]|~#$])", r"\\\1", html.escape(text, quote=False))


def value_cell(value: Any) -> str:
    """Return a setting's value on one line, with escaped column separators of Markdown."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', '"').replace("|", "\\|")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
