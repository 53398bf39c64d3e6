"""Render the page of a report from the runs' records.

The templates escape every value. The page's only script is report.js, which the page's security policy names by its
hash, so no text of a row can become a script.
"""

import base64
import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError  # torch requires jinja2
from markupsafe import Markup

from softprompt.report.comparison import comparison_view, run_names
from softprompt.report.views import run_view
from softprompt.runs.file_names import FACTS_FILE, MARK
from softprompt.runs.run_reader import RunRecord
from softprompt.utils.errors import ReportError
from softprompt.utils.redact import redacted
from softprompt.utils.text_table import display_width
from softprompt.utils.translation import HTML_NAMES, language, translate

TEMPLATE, STYLE, SCRIPT = "report.html.jinja", "report.css", "report.js"
MAX_CHARACTERS = 4000  # longer texts are truncated
FOLDED_WIDTH, FOLDED_LINES = 160, 4  # columns and lines; only the beginning of a wider or longer text is shown
RELOAD_SECONDS = 5  # interval at which the page of a running training reloads itself


def page(records: Sequence[RunRecord], broken: Sequence[str] = (), live: bool = False) -> str:
    """Return one HTML document, which loads no other files and can be read without its script.

    Args:
        records: The runs to show.
        broken: An error message for each further run, which cannot be shown.
        live: Whether the file will be rewritten; the page then reloads itself.

    Raises:
        ReportError: The report.json of a run does not have the content that this version writes.
    """
    names = run_names(records)
    views = []
    for record, name in zip(records, names, strict=True):
        with _unexpected_content(record):
            views.append(run_view(record, name))
    script = _text_of(SCRIPT)
    values = {
        "lang": HTML_NAMES[language()],
        "runs": views,
        "broken": broken,
        "names": names,
        "compared": comparison_view(records, names) if len(records) > 1 else None,
        "mark": Markup(MARK),
        "style": Markup(_text_of(STYLE)),
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "reload": RELOAD_SECONDS if live else None,
    }
    template = _environment().get_template(TEMPLATE)
    with _unexpected_content(*records):
        return redacted(template.render(**values))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.globals["_"] = translate
    environment.filters |= {"shown": _shown, "number": _number, "beginning": _beginning}
    return environment


@cache
def _text_of(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


@contextmanager
def _unexpected_content(*records: RunRecord) -> Iterator[None]:
    """Raise ReportError for an error that is caused by a report.json of another version, or one edited by hand."""
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, TemplateError) as error:
        files = ", ".join(str(record.folder / FACTS_FILE) for record in records)
        what = f"{type(error).__name__}: {error}"
        raise ReportError(
            f"{files}: not in the format of this version ({what}); make the report with the version that wrote the run"
        ) from None


def _shown(text: Any) -> str:
    """Return the beginning of a text, with control characters replaced, since HTML cannot show them."""
    text = re.sub(r"\n\s*\n", "\n", str(text).strip("\n"))  # drop empty lines, such as those of a template
    text = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + "…"


def _beginning(text: str) -> str | None:
    """Return the beginning of a text that is to be folded; None if the text is short."""
    start = "\n".join(text.split("\n")[:FOLDED_LINES])
    while display_width(start) > FOLDED_WIDTH:
        start = start[: len(start) * FOLDED_WIDTH // display_width(start)]
    return None if len(text) <= 1.25 * len(start) else start.rstrip() + "…"


def _number(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
