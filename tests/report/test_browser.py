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
INKS = """[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,
    ...[...document.querySelectorAll('svg text')].map(e => getComputedStyle(e).fill)]"""
OPEN_ALL = "document.querySelectorAll('details').forEach(e => { e.open = true })"
HEIGHT = "document.documentElement.scrollHeight"
TIP = "document.querySelector('.tip')?.innerText"
SHORT = 2600  # pixels of a phone's page about one run; with everything open it has about three times as many


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
        tab.ask(OPEN_ALL)
        assert tab.ask(WIDE) == 0, (width, tab.ask(BEYOND))
        assert tab.ask(BEYOND) == [], width
        assert tab.ask(BLANK) == [] and tab.ask(SMALLEST) >= 9, width
        assert tab.requests == [pages[name].resolve().as_uri()]
    assert tab.complaints == []


def test_dark_mode_applies_on_screen_and_not_in_print(pages, tab):
    def shades(**media):
        """The luminances of the page, its text, and the ticks of its charts."""
        tab.open(pages["one"], **media)
        return [luminance(color) for color in tab.ask(INKS)]

    for media, dark in (({}, False), ({}, True), ({"media": "print"}, True)):
        page, *inks = shades(**media, prefers_color_scheme="dark" if dark else "light")
        assert (page < 0.1) == (dark and not media) and len(inks) > 20
        for ink in inks:
            assert (max(page, ink) + 0.05) / (min(page, ink) + 0.05) >= 4.5  # WCAG's least contrast of text


def luminance(color: str) -> float:
    """WCAG's relative luminance of a color that is written as rgb(…)."""
    values = [int(n) / 255 for n in color.strip("rgb()").split(",")[:3]]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_phones_page_is_short_until_a_section_is_opened(pages, tab):
    tab.open(pages["one"], 390)
    assert tab.ask(HEIGHT) < SHORT and tab.ask("document.querySelectorAll('details.fold[open]').length") == 1
    tab.ask("document.querySelector('nav a[href=\"#run1-settings\"]').click()")
    assert tab.ask("document.getElementById('run1-settings').checkVisibility()")
    tab.ask(OPEN_ALL)
    assert tab.ask(HEIGHT) > SHORT
    tab.open(pages["one"], 1280)
    assert tab.ask("document.querySelectorAll('details.fold:not([open])').length") == 0


def test_pointing_at_a_chart_shows_its_values(pages, tab):
    tab.open(pages["one"])
    assert tab.ask(TIP) is None
    tab.point(".chart svg", 0.99, 0.5)
    told = tab.ask(TIP)
    (values,) = [tab.ask(f"document.querySelector('[data-curve=\"{n}\"][data-values]').dataset.values") for n in (0,)]
    assert told.startswith("step 6") and f"training {values.split('|')[-1]}" in told and "held out" in told
    tab.point("h1", 0.5, 0.5)
    assert tab.ask(TIP) is None
    tab.point(".small svg", 0.5, 0.5)
    assert tab.ask(TIP).startswith("tokens ")


def test_what_is_folded_is_printed(pages, tab):
    hidden = "[...document.querySelectorAll('.anchor, .more ul')].filter(e => !e.checkVisibility()).length"
    for name in ("one", "both"):
        for media, shown in (("print", True), ("screen", False)):
            tab.open(pages[name], 650, media=media)
            tab.ask("document.querySelectorAll('details').forEach(e => { e.open = false })")
            assert (tab.ask(hidden) == 0) == shown


def test_pages_can_be_read_without_their_script(pages, tab):
    tab("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.open(pages["one"], 390)
        assert tab.ask("document.querySelectorAll('details.fold:not([open])').length") == 0
        assert tab.ask(BLANK) == []
    finally:
        tab("Emulation.setScriptExecutionDisabled", value=False)


def test_pages_can_be_printed(pages, tab):
    tab.open(pages["one"])
    paper = tab.pdf()
    assert paper.startswith(b"%PDF") and len(paper) > 20_000
    assert tab.complaints == []
