"""Reports in a headless browser: narrow, wide, light, dark, printed. Needs Chromium (apt install chromium)."""

import json

import pytest
from helpers import browser
from helpers.reported_runs import settings_in

import softprompt
from softprompt.report.writer import report

pytestmark = [
    pytest.mark.pictures,
    pytest.mark.skipif(browser.FOUND is None, reason=f"no browser here: none of {', '.join(browser.NAMES)}"),
]
WIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
BEYOND = """[...document.querySelectorAll('body *')].filter(e => !e.closest('svg, thead') &&
    e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(e => e.outerHTML.slice(0, 90))"""
BLANK = """[...document.querySelectorAll('svg')].filter(e => e.getBoundingClientRect().height < 100 ||
    !e.querySelector('path, image')).map(e => e.getAttribute('aria-label'))"""
SMALLEST = """Math.min(...[...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height))"""
INKS = (
    """[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('svg text')).fill]"""
)


@pytest.fixture(scope="module")
def pages(tiny_base, tmp_path_factory):
    """Reports of a run with every section, of one with long texts, and of both side by side."""
    folder = tmp_path_factory.mktemp("shown")
    settings = settings_in(folder, tiny_base)
    softprompt.train(**settings)
    long = [{"instruction": "w" * 300 + "没有空格的很长的一句话" * 20, "output": "x" * 200} for _ in range(12)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, long)))
    longer = {"output_dir": str(folder / ("a_run_with_a_very_long_name" * 3)), "num_virtual_tokens": 30}
    other = softprompt.train(**{**settings, **longer, "max_length": 1024}).output_dir
    both = report(folder / "run", other, output_file=folder / "both.html")
    return {"one": folder / "run/report.html", "long": other / "report.html", "both": both}


@pytest.fixture(scope="module")
def tab():
    opened = browser.Browser()
    yield opened
    opened.close()


@pytest.mark.parametrize("name", ["one", "long", "both"])
def test_pages_fit_every_width_and_load_no_other_file(name, pages, tab):
    for width, medium in ((320, ""), (360, ""), (650, ""), (650, "print"), (820, ""), (1400, "")):
        tab.requests.clear()
        tab.open(pages[name], width, media=medium)
        assert tab.ask(WIDE) == 0, (width, tab.ask(BEYOND))
        assert tab.ask(BEYOND) == [], width
        assert tab.ask(BLANK) == [] and tab.ask(SMALLEST) >= 9, width
        assert tab.requests == [pages[name].resolve().as_uri()]
    assert tab.complaints == []


def test_dark_mode_applies_on_screen_and_not_in_print(pages, tab):
    def shades(**media):
        tab.open(pages["one"], **media)
        return [sum(int(n) for n in color.strip("rgb()").split(",")[:3]) / 3 for color in tab.ask(INKS)]

    page, ink = shades(prefers_color_scheme="light")
    assert page > 240 and ink < 60
    page, ink = shades(prefers_color_scheme="dark")
    assert page < 40 and ink > 200
    page, ink = shades(media="print", prefers_color_scheme="dark")
    assert page > 240 and ink < 60


def test_pages_can_be_printed(pages, tab):
    tab.open(pages["one"])
    paper = tab.pdf()
    assert paper.startswith(b"%PDF") and len(paper) > 20_000
    assert tab.complaints == []
