"""Charts as SVG elements."""

import base64
import re
import zlib
from xml.etree import ElementTree

from softprompt.report.svg import MAX_POINTS, Curve, averaged, heatmap, histogram, line_chart

POINTS = [(10, 4.0), (20, 2.0), (30, 1.0)]


def drawn(svg: str) -> ElementTree.Element:
    """The chart, which must be well-formed."""
    return ElementTree.fromstring(str(svg).replace('href="data:', 'data="data:'))


def ticks(chart: ElementTree.Element, kind: str) -> list[str]:
    return [each.text for each in chart.iter("text") if each.get("class") == kind]


def test_a_curve_is_drawn_where_its_values_are():
    chart = drawn(line_chart([Curve(3, POINTS, markers=True), Curve(1, level=3.0)], "Loss"))
    line = chart.find("polyline")
    places = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
    assert "--c3" in line.get("style") and len(chart.findall("circle")) == 3
    (x1, y1), (x2, y2), (x3, y3) = places
    assert abs((x3 - x2) - (x2 - x1)) < 0.2 and abs((y3 - y2) * 2 - (y2 - y1)) < 0.3 and y1 < y3
    level = next(each for each in chart.iter("path") if each.get("class") == "level")
    height = float(level.get("d").split()[1].split("H")[0])
    assert abs(height - (y1 + y2) / 2) < 0.2  # 3.0 is halfway between 4.0 and 2.0


def test_the_values_under_the_pointer_are_those_of_the_points():
    chart = drawn(line_chart([Curve(0, [(10, 0.25), (20, 1 / 3)])], "Exact match", share=True))
    (data,) = [each for each in chart.iter("g") if each.get("data-points")]
    assert data.get("data-at") == "step 10|step 20" and data.get("data-values") == "25.0%|33.3%"
    assert data.get("data-points") == chart.find("polyline").get("points")


def test_one_point_is_no_curve():
    assert not line_chart([Curve(0, POINTS[:1], markers=True), Curve(1, level=3.0)], "Loss")
    assert len(drawn(line_chart([Curve(0, POINTS), Curve(1, POINTS[:1])], "Loss")).findall("polyline")) == 1


def test_an_axis_may_begin_at_zero():
    speeds = [Curve(0, [(1, 5000.0), (2, 6000.0)])]
    assert ticks(drawn(line_chart(speeds, "Speed", from_zero=True)), "end")[0] == "0"
    assert ticks(drawn(line_chart(speeds, "Speed")), "end")[0] != "0"


def test_long_curves_are_averaged():
    points = [(step, float(step % 2)) for step in range(1, 5001)]
    found = averaged(points, 500)
    assert len(found) == 500 and found[-1] == (5000, 0.5) and found[0][0] == 10
    assert averaged(points[:3], 500) == points[:3]
    assert len(drawn(line_chart([Curve(0, points)], "Loss")).find("polyline").get("points").split()) <= MAX_POINTS


def test_bars_of_a_histogram_and_the_limit():
    bars = [(8, 30), (16, 10)]
    chart = drawn(histogram(bars, 16, "Lengths"))
    first, second = (float(bar.get("height")) for bar in chart.iter("rect"))
    assert abs(first - 3 * second) < 0.3
    (data,) = [each for each in chart.iter("g") if each.get("data-at")]
    assert data.get("data-at") == "1 to 8 tokens|9 to 16 tokens" and data.get("data-values") == "30|10"
    (line,) = [path for path in chart.iter("path") if "faint" in path.get("class")]
    assert line.get("d").startswith(f"M{346:.1f} ")  # at the right end
    assert not [path for path in drawn(histogram(bars, None, "")).iter("path") if "faint" in path.get("class")]


def test_the_pixels_of_a_heatmap_are_its_values():
    values = [[1.0, -0.5], [0.0, 1.0]]
    chart = drawn(heatmap(values, "Cosines"))
    assert chart.find("rect").get("data-cells") == "1.00 -0.50;0.00 1.00"
    image = base64.b64decode(chart.find("image").get("data").split(",")[1])
    pixels = zlib.decompress(re.search(rb"IDAT(.*?).{4}\0\0\0\0IEND", image, re.S)[1])
    rows = [pixels[1:9], pixels[10:18]]
    opacity = [[row[3], row[7]] for row in rows]
    assert opacity == [[255, 128], [0, 255]]
    red, blue = rows[0][0:3], rows[0][4:7]
    assert red[0] > red[2] and blue[2] > blue[0]
