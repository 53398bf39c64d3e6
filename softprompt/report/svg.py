"""Pictures of a report: matplotlib's SVG in the page's own colours and letters, so that they follow it into the dark.

Colours are drawn as stand-ins and then replaced by the page's variables; text stays text. No user's text goes into a
picture: names stand in the page's legends.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count
from typing import Any

INSTALL = 'pip install matplotlib (or pip install -e ".[plot]")'
WIDTH, HEIGHT = 4.4, 2.7  # inches of 72 units: one fits a phone, two a screen
MOST_POINTS = 600  # of a curve; longer ones are averaged
SCALES = 20
COLOURS = 8  # --c0 … of the page
INK, FAINT = "#000101", "#000202"


def installed() -> bool:
    """Whether there is what draws."""
    return find_spec("matplotlib") is not None


@dataclass(frozen=True)
class Curve:
    """`points` are (step, value); `colour` is a number of the page's. One with `marks` shows its points, a `level` is a
    dashed line of one value."""

    colour: int
    points: Sequence[tuple[float, float]] = ()
    marks: bool = False
    level: float | None = None


class Painter:
    """Draws pictures one after the other, none of whose ids is another's.

    Raises:
        ImportError: matplotlib is not installed.
    """

    def __init__(self) -> None:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        self.style, self.figure, self.canvas = matplotlib.rc_context, Figure, FigureCanvasSVG
        self.numbers = count()

    def curves(self, curves: Sequence[Curve], label: str, logarithmic: bool = False, share: bool = False) -> str:
        """Over optimizer steps, on a logarithmic scale where small values would lie flat; "" where there is nothing to
        draw."""
        drawn = [curve for curve in curves if curve.points or curve.level is not None]
        if not any(curve.points for curve in drawn):
            return ""
        figure, axes = self._axes(label)
        if logarithmic and spans_scales(drawn):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        for curve in drawn:
            if curve.level is not None:
                axes.axhline(curve.level, color=_stand_in(curve.colour), linestyle=(0, (4, 3)), linewidth=1.2)
                continue
            marks = {"marker": "o", "markersize": 3} if curve.marks or len(curve.points) == 1 else {}
            axes.plot(*zip(*averaged(curve.points), strict=True), color=_stand_in(curve.colour), linewidth=1.3, **marks)
        axes.set_xlabel("optimizer step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if share:
            axes.set_ylim(-0.03, 1.03)
        return self._svg(figure, label)

    def bars(self, bars: Sequence[tuple[float, float]], line: float, label: str) -> str:
        """A histogram of (upper bound, count), and an upright line."""
        figure, axes = self._axes(label)
        edges = [0, *(bound for bound, _ in bars)]
        axes.stairs([n for _, n in bars], edges, fill=True, color=_stand_in(0), alpha=0.75, linewidth=0)
        axes.axvline(line, color=FAINT, linestyle=(0, (4, 3)), linewidth=1.2)
        axes.set_xlabel("tokens of a row")
        return self._svg(figure, label)

    def squares(self, values: Sequence[Sequence[float]], label: str) -> str:
        """A matrix of numbers from -1 to 1, red for alike, blue for opposed."""
        with self._styled():
            figure = self.figure(figsize=(3.3, 2.8))
            axes = figure.add_axes((0.12, 0.13, 0.68, 0.8))
            edge = len(values) + 0.5
            image = axes.imshow(
                values, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="none", extent=(0.5, edge, edge, 0.5)
            )
            _plain(axes, grid=False)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.yaxis.get_major_locator().set_params(integer=True)
            bar = figure.colorbar(image, cax=figure.add_axes((0.83, 0.13, 0.035, 0.8)), ticks=[-1, -0.5, 0, 0.5, 1])
            bar.outline.set_visible(False)
            bar.ax.tick_params(length=0, colors=INK)
        return self._svg(figure, label)

    def _axes(self, label: str) -> tuple[Any, Any]:
        with self._styled():
            figure = self.figure(figsize=(WIDTH, HEIGHT))
            axes = figure.add_axes((0.14, 0.17, 0.83, 0.75))
            _plain(axes)
        return figure, axes

    def _styled(self) -> Any:
        style: Mapping[str, Any] = {"svg.fonttype": "none", "font.size": 9, "axes.formatter.limits": (-3, 5)}
        return self.style({**style, "svg.hashsalt": "softprompt"})

    def _svg(self, figure: Any, label: str) -> str:
        figure.patch.set_visible(False)
        picture = io.StringIO()
        with self._styled():
            self.canvas(figure).print_svg(picture, metadata={"Date": None})
        return _of_the_page(picture.getvalue(), f"p{next(self.numbers)}-", label)


def spans_scales(curves: Sequence[Curve]) -> bool:
    """Whether the values are above 0 and the largest is SCALES times the smallest or more."""
    values = [value for curve in curves for _, value in curve.points]
    values += [curve.level for curve in curves if curve.level is not None]
    return 0 < SCALES * min(values) <= max(values)


def averaged(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most so many points: each the mean of as many neighbours, at the step of the last of them."""
    each = -(-len(points) // most)
    groups = [points[start : start + each] for start in range(0, len(points), each)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _plain(axes: Any, grid: bool = True) -> None:
    axes.patch.set_visible(False)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0, colors=INK)
    axes.xaxis.label.set_color(INK)
    for shift in (axes.xaxis.get_offset_text(), axes.yaxis.get_offset_text()):
        shift.set_color(INK)
    if grid:
        axes.grid(color=FAINT, alpha=0.35, linewidth=0.6)
        axes.set_axisbelow(True)


def _stand_in(colour: int) -> str:
    return f"#0003{colour % COLOURS:02d}"


def _of_the_page(svg: str, prefix: str, label: str) -> str:
    """matplotlib's file as an element of the page: no prolog, no metadata, ids of its own, colours by their names."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'^<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{label}">', svg)
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", svg).replace("xlink:href", "href")
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", svg)
    for colour in range(COLOURS):
        svg = svg.replace(_stand_in(colour), f"var(--c{colour})")
    return svg.replace(INK, "var(--ink)").replace(FAINT, "var(--faint)")
