"""Charts of a report: SVG elements in the colors and fonts of the page, so that they follow its dark mode.

Charts contain no text of the user: the names of runs are in the legends, which are part of the page. The elements with
data-points hold what the page's script shows under the pointer: data-at names the points, data-values their values.
"""

import base64
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from softprompt.report.axes import Axis, number, share_axis, step_axis, value_axis
from softprompt.utils.translation import translate

WIDTH, HEIGHT = 360, 214  # one chart is as wide as a phone, three as a screen
TOP, RIGHT, BOTTOM = 8, 14, 36  # margins of the plot area
CHARACTER = 7.4  # maximum width of a digit at the font size of charts
MAX_POINTS = 600  # per curve; longer curves are averaged
MARKED_POINTS = 60  # only curves of at most this many points have markers
COLORS = 8  # --c0 to --c7 of the page
POSITIVE, NEGATIVE = (178, 24, 43), (33, 102, 172)  # red and blue of a heatmap


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


def line_chart(
    curves: Sequence[Curve], label: str, logarithmic: bool = False, share: bool = False, from_zero: bool = False
) -> Markup:
    """Return curves over the optimizer steps; empty if no curve has two points, since a single point makes no curve.

    Args:
        curves: The curves.
        label: Label for screen readers.
        logarithmic: Use a logarithmic scale if `needs_log_scale` says so.
        share: The values are fractions from 0 to 1.
        from_zero: Begin the axis of the values at 0.
    """
    drawn = [curve for curve in curves if len(curve.points) > 1]
    if not drawn:
        return Markup()
    levels = [(curve.color, curve.level) for curve in curves if curve.level is not None]
    values = [value for curve in drawn for _, value in curve.points] + [level for _, level in levels]
    x = step_axis(max(step for curve in drawn for step, _ in curve.points))
    y = share_axis() if share else value_axis(values, logarithmic, from_zero)
    frame = _Frame(x, y)
    parts = [frame.grid(translate("optimizer step"))]
    for color, level in levels:
        parts.append(f'<path class="level" {_colored(color)} d="M{frame.left:.1f} {frame.y(level):.1f}H{frame.end}"/>')
    parts += [_curve(frame, curve, share) for curve in drawn]
    return _svg(parts, label)


def histogram(bars: Sequence[tuple[float, int]], line: float | None, label: str) -> Markup:
    """Return a histogram of (upper bound, count) pairs, with a dashed vertical line at `line`."""
    end = max(bars[-1][0], line or 0)
    frame = _Frame(step_axis(end), value_axis([n for _, n in bars], from_zero=True))
    edges = [0, *(bound for bound, _ in bars)]
    places = [(a, b, n) for a, b, n in zip(edges, edges[1:], (n for _, n in bars), strict=False)]
    rects = [
        f'<rect class="bar" {_colored(0)} x="{frame.x(a) + 0.5:.1f}" y="{frame.y(n):.1f}" '
        f'width="{frame.x(b) - frame.x(a) - 1:.1f}" height="{frame.y(0) - frame.y(n):.1f}"/>'
        for a, b, n in places
    ]
    points = [(frame.x((a + b) / 2), frame.y(n)) for a, b, n in places]
    spans = [translate(f"{a + 1:,} to {b:,} tokens" if b > a + 1 else f"{b:,} tokens") for a, b, _ in places]
    values = _data(0, points, spans, [f"{n:,}" for _, _, n in places])
    parts = [frame.grid(translate("tokens of a row")), *rects, f"<g {values}></g>"]
    if line is not None:
        parts.append(f'<path class="level faint" d="M{frame.x(line):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
    return _svg(parts, label)


def heatmap(values: Sequence[Sequence[float]], label: str) -> Markup:
    """Return a square matrix of numbers from -1 (blue) to 1 (red); 0 is transparent."""
    size, left, top = 176, 30, 6
    axis = step_axis(len(values))
    parts = [
        f'<image x="{left}" y="{top}" width="{size}" height="{size}" preserveAspectRatio="none" '
        f'href="data:image/png;base64,{base64.b64encode(_png(values)).decode()}"/>'
    ]
    cell = size / len(values)
    for tick, text in zip(axis.ticks, axis.labels, strict=True):
        if 1 <= tick <= len(values):
            middle = (tick - 0.5) * cell
            parts.append(f'<text class="end" x="{left - 5}" y="{top + middle + 4:.1f}">{text}</text>')
            parts.append(f'<text class="middle" x="{left + middle:.1f}" y="{top + size + 15}">{text}</text>')
    pair = translate("tokens {i} and {j}")  # how the page's script names a cell
    cells = ";".join(" ".join(f"{value:.2f}" for value in row) for row in values)
    data = f'data-cells="{cells}" data-pair="{pair}"'
    parts.append(f'<rect class="cells" x="{left}" y="{top}" width="{size}" height="{size}" {data}/>')
    return _svg(parts, label, left + size + 8, top + size + 22)


class _Frame:
    """The plot area of a chart, and its two axes."""

    def __init__(self, x: Axis, y: Axis):
        self.horizontal, self.vertical = x, y
        self.left = 8 + CHARACTER * max(map(len, y.labels), default=0)
        self.end = WIDTH - RIGHT

    def x(self, value: float) -> float:
        return self.left + self.horizontal.fraction(value) * (self.end - self.left)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - self.vertical.fraction(value) * (HEIGHT - BOTTOM - TOP)

    def grid(self, label: str) -> str:
        """Return the grid, the labels of both axes, and the name of the horizontal one."""
        lines = [f"M{self.left:.1f} {self.y(tick):.1f}H{self.end}" for tick in self.vertical.ticks]
        lines += [f"M{self.x(tick):.1f} {TOP}V{HEIGHT - BOTTOM}" for tick in self.horizontal.ticks]
        words = [
            f'<text class="end" x="{self.left - 5:.1f}" y="{self.y(tick) + 4:.1f}">{text}</text>'
            for tick, text in zip(self.vertical.ticks, self.vertical.labels, strict=True)
        ]
        words += [
            f'<text class="middle" x="{self.x(tick):.1f}" y="{HEIGHT - BOTTOM + 15}">{text}</text>'
            for tick, text in zip(self.horizontal.ticks, self.horizontal.labels, strict=True)
        ]
        middle = (self.left + self.end) / 2
        words.append(f'<text class="middle title" x="{middle:.1f}" y="{HEIGHT - 4}">{label}</text>')
        return f'<path class="grid" d="{"".join(lines)}"/>{"".join(words)}'


def _curve(frame: _Frame, curve: Curve, share: bool) -> str:
    shown = averaged(curve.points)
    points = [(frame.x(step), frame.y(value)) for step, value in shown]
    steps = [translate(f"step {step:,}") for step, _ in shown]
    values = [f"{value:.1%}" if share else number(value) for _, value in shown]
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    line = f'<polyline class="line" {_colored(curve.color)} points="{places}"/>'
    dots = "".join(f'<circle {_colored(curve.color)} cx="{x:.1f}" cy="{y:.1f}" r="2.4"/>' for x, y in points)
    marked = dots if curve.markers and len(points) <= MARKED_POINTS else ""
    return f"{line}{marked}<g {_data(curve.color, points, steps, values)}></g>"


def averaged(points: Sequence[tuple[float, float]], limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """Return at most `limit` points. Each is the mean of equally many consecutive points, placed at the last
    one's step; the last may be the mean of fewer."""
    each = -(-len(points) // limit)
    groups = [points[start : start + each] for start in range(0, len(points), each)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _data(color: int, points: Sequence[tuple[float, float]], at: Sequence[str], values: Sequence[str]) -> str:
    """Return the attributes that the page's script reads."""
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'data-curve="{color}" data-points="{places}" data-at="{"|".join(at)}" data-values="{"|".join(values)}"'


def _colored(color: int) -> str:
    return f'style="--mine:var(--c{color % COLORS})"'


def _svg(parts: Sequence[str], label: str, width: float = WIDTH, height: float = HEIGHT) -> Markup:
    shape = f'viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{Markup.escape(label)}"'
    return Markup(f"<svg {shape}>{''.join(parts)}</svg>")


def _png(values: Sequence[Sequence[float]]) -> bytes:
    """Return an image with one pixel for each value, whose color is stronger the further the value is from 0."""
    rows = b"".join(b"\0" + b"".join(map(_pixel, row)) for row in values)
    header = struct.pack(">IIBBBBB", len(values[0]), len(values), 8, 6, 0, 0, 0)  # 8 bits for each of R, G, B, A
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def _pixel(value: float) -> bytes:
    strength = round(255 * min(1.0, abs(value)))
    return bytes([*(POSITIVE if value > 0 else NEGATIVE), strength])
