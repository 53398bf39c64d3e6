"""The charts of one run, and of several runs side by side."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from softprompt.report.results import commonest_share
from softprompt.report.svg import Curve, heatmap, histogram, line_chart
from softprompt.runs.run_reader import RunRecord
from softprompt.utils.metrics import METRICS
from softprompt.utils.translation import translate

LOSSES = {"loss": "training", "eval_loss": "held out"}
SHARES = ("eval_accuracy", "eval_exact_match", "eval_agreement")  # fractions from 0 to 1
QUALITY = {
    "eval_accuracy": "Accuracy of the most likely label",
    "eval_exact_match": "Exact match of held-out answers",
    "eval_agreement": "Same most likely token as with the text",
}
BASE, COMMONEST = 7, 3  # colors of the base alone and of the most common label
COURSE = {  # charts of the optimization, below those of losses and answers
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm, before clipping",
    "tokens_per_second": "Tokens per second, without padding",
}


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        title: The text above it.
        svg: The SVG element.
        legend: For each entry the number of a color of the page (-1: faint), whether the line is dashed, and the text.
        note: The text below it; may be empty.
        scale: Whether it is a heatmap, whose legend is a scale of colors.
    """

    title: str
    svg: Markup
    legend: Sequence[tuple[int, bool, str]] = ()
    note: str = ""
    scale: bool = False


def run_charts(record: RunRecord) -> list[Chart]:
    """Return the charts of the losses and of the answers of one run. A metric that was measured only once has none."""
    charts = list(_chart("loss", "Loss, nats per target token", *_losses(record)))
    for name, title in QUALITY.items():
        commonest = commonest_share(record) if name == "eval_accuracy" else None
        levels = [(BASE, "base alone", record.of_base(name)), (COMMONEST, "most common label", commonest)]
        known = [(color, text, level) for color, text, level in levels if level is not None]
        curves = [Curve(0, record.series(name), markers=True), *(Curve(color, level=y) for color, _, y in known)]
        legend = [(0, False, translate("with the prompt"))]
        legend += [(color, True, f"{translate(text)} ({y:.1%})") for color, text, y in known]
        charts += _chart(name, title, curves, legend)
    return charts


def course_charts(record: RunRecord) -> list[Chart]:
    """Return the charts of the learning rate, the gradient norm and the speed of one run."""
    return [
        chart for name, title in COURSE.items() for chart in _chart(name, title, [Curve(0, record.series(name))], [])
    ]


def compared_charts(records: Sequence[RunRecord], names: Sequence[str]) -> tuple[list[Chart], list[Chart]]:
    """Return the charts of losses and answers, and the other charts, with a curve for each run."""
    quality = {"loss": "Training loss", "eval_loss": "Held-out loss", **QUALITY}
    first, others = ([*_compared(records, names, titles)] for titles in (quality, COURSE))
    return first, others


def lengths_chart(kind: str, bars: Sequence[tuple[int, int]], limit: int) -> Chart:
    """Return the histogram of the lengths of rows of a kind: "training", "held out" or "the stream's first"."""
    title = translate(f"Lengths of {'the training' if kind == 'training' else kind} rows")
    if limit > 1.5 * bars[-1][0]:  # a line there would leave little width for the bars
        note = translate(f"--max_length {limit:,} is longer than every row.")
        return Chart(title, histogram(bars, None, title), note=note)
    legend = [(0, False, translate("rows")), (-1, True, f"--max_length {limit:,}")]
    return Chart(title, histogram(bars, limit, title), legend)


def cosines_chart(likeness: Mapping[str, Any]) -> Chart | None:
    """Return the cosines between the virtual tokens; None if there is only one token."""
    values = likeness["similarities"]
    if len(likeness["tokens"]) < 2:
        return None
    others = [value for i, row in enumerate(values) for j, value in enumerate(row) if i != j]
    title = translate("Cosine between the virtual tokens")
    mean = sum(others) / len(others)
    note = f"Between different tokens: {min(others):.2f} to {max(others):.2f}, {mean:.2f} on average."
    return Chart(title, heatmap(values, title), note=translate(note), scale=True)


def _losses(record: RunRecord) -> tuple[list[Curve], list[tuple[int, bool, str]]]:
    """Return the curves and the legend of the loss chart. The line of the base alone is drawn only together with a
    curve of the same held-out rows."""
    curves, legend = [], []
    for color, (name, text) in enumerate(LOSSES.items()):
        if len(points := record.series(name)) > 1:
            curves.append(Curve(color, points, markers=color > 0))
            legend.append((color, False, translate(text)))
    base = record.of_base("eval_loss")
    if base is not None and len(record.series("eval_loss")) > 1:
        curves.append(Curve(BASE, level=base))
        legend.append((BASE, True, translate(f"held out, base alone ({base:.4f})")))
    return curves, legend


def _compared(records: Sequence[RunRecord], names: Sequence[str], titles: Mapping[str, str]) -> Iterator[Chart]:
    for metric, title in titles.items():
        series = [record.series(metric) for record in records]
        drawn = [n for n, points in enumerate(series) if len(points) > 1]
        curves = [Curve(n, series[n], markers=metric.startswith("eval")) for n in drawn]
        legend = [(n, False, names[n]) for n in drawn]
        levels: Mapping[float, int] = {
            level: n for n in reversed(drawn) if (level := records[n].of_base(metric)) is not None
        }
        for level, n in sorted(levels.items(), key=lambda each: each[1]):
            alone = f"{translate('base alone')} ({METRICS[metric].form.format(level)})"
            curves.append(Curve(n, level=level))
            legend.append((n, True, alone if len(levels) == 1 else f"{names[n]}, {alone}"))
        yield from _chart(metric, title, curves, legend)


def _chart(name: str, title: str, curves: Sequence[Curve], legend: Sequence[tuple[int, bool, str]]) -> Iterable[Chart]:
    """Yield the chart of a metric if it was measured more than once."""
    title, at_zero = translate(title), name == "tokens_per_second"
    if svg := line_chart(curves, title, logarithmic=name in LOSSES, share=name in SHARES, from_zero=at_zero):
        yield Chart(title, svg, legend)
