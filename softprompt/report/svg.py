"""Charts of a report: SVG by matplotlib in the colors and fonts of the page, so that they follow its dark mode.

Charts are drawn in placeholder colors, which are then replaced by the CSS variables of the page. Text is not converted
to paths. Charts contain no text of the user: the names of runs are in the legends, which are part of the page.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count
from typing import Any

INSTALL = 'pip install matplotlib (or pip install -e ".[plot]")'
WIDTH, HEIGHT = 4.4, 2.7  # inches (72 SVG units each): one chart is as wide as a phone, two as a screen
MAX_POINTS = 600  # per curve; longer curves are averaged
LOG_SCALE_RATIO = 20  # use a logarithmic scale if the largest value is at least this many times the smallest
COLORS = 8  # --c0 to --c7 of the page
INK, FAINT = "#000101", "#000202"  # placeholders for --ink and --faint


def installed() -> bool:
    """Return whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


@dataclass(frozen=True)
class Curve:
    """A curve of a line chart.

    Args:
        color: Number of a color of the page.
        points: Pairs of step and value.
        markers: Whether to mark the points.
        level: Draw a dashed horizontal line at this value instead of the points.
    """

    color: int
    points: Sequence[tuple[float, float]] = ()
    markers: bool = False
    level: float | None = None


class ChartRenderer:
    """Draws the charts of one page. Ids within the SVGs are unique on the page.

    Raises:
        ImportError: Matplotlib is not installed.
    """

    def __init__(self) -> None:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        self.rc_context, self.figure, self.canvas = matplotlib.rc_context, Figure, FigureCanvasSVG
        self.numbers = count()

    def line_chart(self, curves: Sequence[Curve], label: str, logarithmic: bool = False, share: bool = False) -> str:
        """Return curves over the optimizer steps as SVG; "" if no curve has points.

        Args:
            curves: The curves.
            label: Label for screen readers.
            logarithmic: Use a logarithmic scale if `needs_log_scale` says so.
            share: The values are fractions from 0 to 1.
        """
        drawn = [curve for curve in curves if curve.points or curve.level is not None]
        if not any(curve.points for curve in drawn):
            return ""
        figure, axes = self._axes(label)
        if logarithmic and needs_log_scale(drawn):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        for curve in drawn:
            if curve.level is not None:
                axes.axhline(curve.level, color=_placeholder(curve.color), linestyle=(0, (4, 3)), linewidth=1.2)
                continue
            style = {"color": _placeholder(curve.color), "linewidth": 1.3}
            if curve.markers or len(curve.points) == 1:
                style |= {"marker": "o", "markersize": 3}
            axes.plot(*zip(*averaged(curve.points), strict=True), **style)
        axes.set_xlabel("optimizer step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if share:
            axes.set_ylim(-0.03, 1.03)
        return self._svg(figure, label)

    def histogram(self, bars: Sequence[tuple[float, float]], line: float, label: str) -> str:
        """Return a histogram of (upper bound, count) pairs, with a dashed vertical line at `line`, as SVG."""
        figure, axes = self._axes(label)
        edges = [0, *(bound for bound, _ in bars)]
        axes.stairs([n for _, n in bars], edges, fill=True, color=_placeholder(0), alpha=0.75, linewidth=0)
        axes.axvline(line, color=FAINT, linestyle=(0, (4, 3)), linewidth=1.2)
        axes.set_xlabel("tokens of a row")
        return self._svg(figure, label)

    def heatmap(self, values: Sequence[Sequence[float]], label: str) -> str:
        """Return a square matrix of numbers, drawn from -1 (blue) to 1 (red), as SVG."""
        with self._style():
            figure = self.figure(figsize=(3.3, 2.8))
            axes = figure.add_axes((0.12, 0.13, 0.68, 0.8))
            edge = len(values) + 0.5
            image = axes.imshow(
                values, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="none", extent=(0.5, edge, edge, 0.5)
            )
            _style_axes(axes, grid=False)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.yaxis.get_major_locator().set_params(integer=True)
            bar = figure.colorbar(image, cax=figure.add_axes((0.83, 0.13, 0.035, 0.8)), ticks=[-1, -0.5, 0, 0.5, 1])
            bar.outline.set_visible(False)
            bar.ax.tick_params(length=0, colors=INK)
        return self._svg(figure, label)

    def _axes(self, label: str) -> tuple[Any, Any]:
        with self._style():
            figure = self.figure(figsize=(WIDTH, HEIGHT))
            axes = figure.add_axes((0.14, 0.17, 0.83, 0.75))
            _style_axes(axes)
        return figure, axes

    def _style(self) -> Any:
        style: Mapping[str, Any] = {"svg.fonttype": "none", "font.size": 9, "axes.formatter.limits": (-3, 5)}
        return self.rc_context({**style, "svg.hashsalt": "softprompt"})

    def _svg(self, figure: Any, label: str) -> str:
        figure.patch.set_visible(False)
        image = io.StringIO()
        with self._style():
            self.canvas(figure).print_svg(image, metadata={"Date": None})
        return _for_page(image.getvalue(), f"p{next(self.numbers)}-", label)


def needs_log_scale(curves: Sequence[Curve]) -> bool:
    """Return whether all values are above 0 and the largest is at least LOG_SCALE_RATIO times the smallest."""
    values = [value for curve in curves for _, value in curve.points]
    values += [curve.level for curve in curves if curve.level is not None]
    return 0 < LOG_SCALE_RATIO * min(values) <= max(values)


def averaged(points: Sequence[tuple[float, float]], limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """Return at most `limit` points. Each is the mean of equally many consecutive points, placed at the last
    one's step; the last may be the mean of fewer."""
    each = -(-len(points) // limit)
    groups = [points[start : start + each] for start in range(0, len(points), each)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _style_axes(axes: Any, grid: bool = True) -> None:
    axes.patch.set_visible(False)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0, colors=INK)
    axes.xaxis.label.set_color(INK)
    for offset in (axes.xaxis.get_offset_text(), axes.yaxis.get_offset_text()):
        offset.set_color(INK)
    if grid:
        axes.grid(color=FAINT, alpha=0.35, linewidth=0.6)
        axes.set_axisbelow(True)


def _placeholder(color: int) -> str:
    return f"#0003{color % COLORS:02d}"


def _for_page(svg: str, prefix: str, label: str) -> str:
    """Convert matplotlib's SVG file to an element of the page: remove prolog and metadata, put `prefix` before all ids,
    and use the page's colors and fonts."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'^<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{label}">', svg)
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", svg).replace("xlink:href", "href")
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", svg)
    for color in range(COLORS):
        svg = svg.replace(_placeholder(color), f"var(--c{color})")
    return svg.replace(INK, "var(--ink)").replace(FAINT, "var(--faint)")
