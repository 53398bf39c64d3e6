"""Charts of a study: the held-out loss over each setting that varies, with its standard deviation over the seeds."""

import io
import math
import warnings
from collections.abc import Callable, Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

from softprompt.study.results import CellResult, at_best_learning_rate, group_by, key_without, varied_context

INSTALL = 'pip install matplotlib (or pip install -e ".[plot]")'
MAX_LINES = 8  # per chart; more cannot be told apart
MAX_LABEL = 30  # characters of a text or a setting in a line's label


class Axis(NamedTuple):
    """A setting that a study varies.

    Args:
        field: The field of a CellResult that distinguishes its values.
        label: Label of the axis.
        value: Position of a result on the axis.
        categorical: Whether the values are texts, which are placed side by side. Numbers use a logarithmic scale.
    """

    field: str
    label: str
    value: Callable[[CellResult], Any]
    categorical: bool = False


AXES = (
    Axis("virtual_tokens", "virtual tokens", lambda r: r.virtual_tokens),
    Axis("init", "start", lambda r: r.init, categorical=True),
    Axis("reparameterization", "reparameterization", lambda r: r.reparameterization, categorical=True),
    Axis("learning_rate", "learning rate", lambda r: r.learning_rate),
    Axis("rows", "training rows", lambda r: r.rows),
    Axis("base", "parameters of the base", lambda r: r.parameters),
)
CHART_FILES = {f"study-{axis.field}.svg" for axis in AXES}


def charts(results: Sequence[CellResult]) -> dict[str, bytes] | None:
    """Return SVG files by name, one for each axis with several values; None if matplotlib is not installed.

    The cells of a line differ only in the axis and the seed. Each setting is shown at its best learning rate, unless
    the axis is the learning rate. The error bars are one standard deviation over the seeds to each side.
    """
    try:
        import matplotlib
    except ImportError:
        return None
    files = {}
    with matplotlib.rc_context({"svg.hashsalt": "softprompt", "svg.fonttype": "none", "axes.grid": True}):
        for axis in AXES:
            lines = _lines(_finite(_cells_on(results, axis)), axis)
            if lines:
                files[f"study-{axis.field}.svg"] = _draw(lines, axis)
    return files


def _cells_on(results: Sequence[CellResult], axis: Axis) -> list[CellResult]:
    """Return the trained cells that an axis shows, at their best learning rates.

    Initializations have different default rates, so each initialization uses its own best rate.
    """
    if axis.field == "learning_rate":
        return [r for r in results if r.trained and not r.failed]
    return at_best_learning_rate(results, *([] if axis.categorical else [axis.field]))


def _finite(results: Sequence[CellResult]) -> list[CellResult]:
    """Leave out settings whose loss is not finite for some seed: the mean over the other seeds would be too good."""
    settings = group_by(results, key_without("seed")).values()
    return [r for cells in settings if all(r.loss < math.inf for r in cells) for r in cells]


def _lines(results: Sequence[CellResult], axis: Axis) -> list[tuple[str, list[CellResult]]]:
    """Return the labels and cells of lines with several values on the axis: at most MAX_LINES, the longest first."""
    setting = key_without(axis.field, "learning_rate", "seed", *(["start"] if axis.field == "init" else []))
    groups = [cells for cells in group_by(results, setting).values() if len({axis.value(r) for r in cells}) > 1]
    groups = sorted(groups, key=len, reverse=True)[:MAX_LINES]
    shown = [r for cells in groups for r in cells]
    labels = [_label(cells[0], shown, axis) for cells in groups]
    if len(set(labels)) < len(labels):  # long texts that begin alike, or bases with the same name in different folders
        labels = [_label(cells[0], shown, axis, shorten=False) for cells in groups]
    return list(zip(labels, groups, strict=True))


def _label(r: CellResult, shown: Sequence[CellResult], axis: Axis, shorten: bool = True) -> str:
    """Return the settings that distinguish a line from the others."""
    values = {
        "base": r.base.rsplit("/", 1)[-1] if shorten else r.base,
        "dataset": r.dataset,
        "init": r.init,
        "reparameterization": r.reparameterization,
        "virtual_tokens": f"{r.virtual_tokens} virtual token" + "s" * (r.virtual_tokens > 1),
        "rows": f"{r.rows:,} row" + "s" * (r.rows > 1),
        "start": r.start,
        "context": varied_context(shown)(r),
    }
    on_axis = ("init", "start") if axis.field == "init" else (axis.field,)
    rivals = {"start": [q for q in shown if q.init == r.init]}  # other initializations are distinguished by their name
    varied = [f for f in values if f not in on_axis and len({getattr(q, f) for q in rivals.get(f, shown)}) > 1]
    return ", ".join(_printable(values[f], shorten) for f in varied) or "held-out loss"


def _printable(text: str, shorten: bool) -> str:
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text[:MAX_LABEL] + "…" if shorten and len(text) > MAX_LABEL else text


def _draw(lines: Sequence[tuple[str, list[CellResult]]], axis: Axis) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    handles: list[Any] = []
    values = sorted({axis.value(r) for _, cells in lines for r in cells})
    for _, cells in lines:
        by_value = group_by(cells, axis.value)
        here = sorted(by_value)
        losses = [[r.loss for r in by_value[value]] for value in here]
        deviations = [stdev(of_seeds) if len(of_seeds) > 1 else 0.0 for of_seeds in losses]
        positions = [values.index(value) for value in here] if axis.categorical else here
        style = {"linestyle": "none"} if axis.categorical else {}
        means = [mean(of_seeds) for of_seeds in losses]
        handles.append(axes.errorbar(positions, means, deviations, marker="o", capsize=3, **style))
    if axis.categorical:
        axes.set_xticks(range(len(values)), values)
    else:
        axes.set_xscale("log")
        if axis.field != "base":
            axes.set_xticks(values, [f"{value:g}" for value in values], minor=False)
            axes.minorticks_off()
    axes.set_yscale("log")
    axes.set(xlabel=axis.label, ylabel="held-out loss (nats per target)")
    legend = axes.legend(handles, [label for label, _ in lines], fontsize="small")
    for text in legend.get_texts():
        text.set_parse_math(False)  # a path or a text may contain $
    image = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about missing glyphs, which the SVG does not embed
        figure.savefig(image, format="svg", metadata={"Date": None, "Creator": "softprompt"})
    return image.getvalue()
