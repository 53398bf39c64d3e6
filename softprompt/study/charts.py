"""Pictures of a study: the held-out loss along each thing that it varies, with the spread over the seeds."""

import io
import math
import warnings
from collections.abc import Callable, Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

from softprompt.study.results import Point, at_best_rate, grouped, other_settings, without

MOST_LINES = 8  # in a picture; more cannot be told apart
MOST_LETTERS = 30  # of a text or a setting in a line's name


class Axis(NamedTuple):
    """Something that a study varies: the field of a Point that tells its values apart, what stands on the axis, and the
    place of a point on it; `texts` are put beside each other, numbers on a logarithmic scale."""

    field: str
    label: str
    value: Callable[[Point], Any]
    texts: bool = False


AXES = (
    Axis("virtual_tokens", "virtual tokens", lambda p: p.virtual_tokens),
    Axis("init", "start", lambda p: p.init, texts=True),
    Axis("learning_rate", "learning rate", lambda p: p.learning_rate),
    Axis("rows", "training rows", lambda p: p.rows),
    Axis("base", "parameters of the base", lambda p: p.parameters),
)
PICTURE_FILES = {f"study-{axis.field}.svg" for axis in AXES}


def pictures(points: Sequence[Point]) -> dict[str, bytes] | None:
    """SVG files by name, one for each axis with several values; None where matplotlib is not installed.

    A line is of points that differ along the axis and in the seed alone, each at its best learning rate unless that is
    the axis; the error bars are a standard deviation over seeds to either side.
    """
    try:
        import matplotlib
    except ImportError:
        return None
    files = {}
    with matplotlib.rc_context({"svg.hashsalt": "softprompt", "svg.fonttype": "none", "axes.grid": True}):
        for axis in AXES:
            lines = _lines(_finite(_shown(points, axis)), axis)
            if lines:
                files[f"study-{axis.field}.svg"] = _drawn(lines, axis)
    return files


def _shown(points: Sequence[Point], axis: Axis) -> list[Point]:
    """Trained ones at their rates; starts differ in their defaults, so each is at the best of its own."""
    if axis.field == "learning_rate":
        return [p for p in points if p.trained and not p.failed]
    return at_best_rate(points, *([] if axis.texts else [axis.field]))


def _finite(points: Sequence[Point]) -> list[Point]:
    """Without settings of which a seed did not end in finite numbers: the mean of the others would flatter them."""
    settings = grouped(points, without("seed")).values()
    return [p for same in settings if all(p.loss < math.inf for p in same) for p in same]


def _lines(points: Sequence[Point], axis: Axis) -> list[tuple[str, list[Point]]]:
    """The lines that have several places along the axis, with their names; the fullest, if there are too many."""
    apart = without(axis.field, "learning_rate", "seed", *(["start"] if axis.field == "init" else []))
    groups = [same for same in grouped(points, apart).values() if len({axis.value(p) for p in same}) > 1]
    groups = sorted(groups, key=len, reverse=True)[:MOST_LINES]
    flat = [p for same in groups for p in same]
    names = [_named(same[0], flat, axis) for same in groups]
    if len(set(names)) < len(names):  # long texts that begin alike, or bases of one name in several folders
        names = [_named(same[0], flat, axis, whole=True) for same in groups]
    return list(zip(names, groups, strict=True))


def _named(p: Point, among: Sequence[Point], axis: Axis, whole: bool = False) -> str:
    """What tells a line from the others, shortened unless it is to be `whole`."""
    told = {
        "base": p.base if whole else p.base.rsplit("/", 1)[-1],
        "dataset": p.dataset,
        "init": p.init,
        "virtual_tokens": f"{p.virtual_tokens} virtual token" + "s" * (p.virtual_tokens > 1),
        "rows": f"{p.rows:,} row" + "s" * (p.rows > 1),
        "start": p.start,
        "context": other_settings(among)(p),
    }
    along = ("init", "start") if axis.field == "init" else (axis.field,)
    rivals = {"start": [q for q in among if q.init == p.init]}  # another start's text or labels tell nothing more
    varied = [f for f in told if f not in along and len({getattr(q, f) for q in rivals.get(f, among)}) > 1]
    return ", ".join(_short(told[f], whole) for f in varied) or "held-out loss"


def _short(text: str, whole: bool) -> str:
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if whole or len(text) <= MOST_LETTERS else text[:MOST_LETTERS] + "…"


def _drawn(lines: Sequence[tuple[str, list[Point]]], axis: Axis) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    handles: list[Any] = []
    places = sorted({axis.value(p) for _, same in lines for p in same})
    for _, same in lines:
        of_places = grouped(same, axis.value)
        here = sorted(of_places)
        losses = [[p.loss for p in of_places[place]] for place in here]
        spread = [stdev(some) if len(some) > 1 else 0.0 for some in losses]
        at = [places.index(place) for place in here] if axis.texts else here
        line = {"linestyle": "none"} if axis.texts else {}
        means = [mean(some) for some in losses]
        handles.append(axes.errorbar(at, means, spread, marker="o", capsize=3, **line))
    if axis.texts:
        axes.set_xticks(range(len(places)), places)
    else:
        axes.set_xscale("log")
        if axis.field != "base":
            axes.set_xticks(places, [f"{place:g}" for place in places], minor=False)
            axes.minorticks_off()
    axes.set_yscale("log")
    axes.set(xlabel=axis.label, ylabel="held-out loss (nats per target)")
    legend = axes.legend(handles, [name for name, _ in lines], fontsize="small")
    for text in legend.get_texts():
        text.set_parse_math(False)  # a path or a text may hold $
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of letters that matplotlib's font lacks: they stay text here
        figure.savefig(picture, format="svg", metadata={"Date": None, "Creator": "softprompt"})
    return picture.getvalue()
