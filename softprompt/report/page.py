"""Render the page of a report from the runs' records.

The template, report.html.jinja, escapes every value.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError  # torch requires jinja2
from markupsafe import Markup

from softprompt.report.svg import INSTALL, ChartRenderer
from softprompt.report.views import comparison_view, run_names, run_view
from softprompt.runs.file_names import FACTS_FILE, MARK
from softprompt.runs.run_reader import RunRecord
from softprompt.utils.errors import ReportError
from softprompt.utils.redact import redacted

TEMPLATE = "report.html.jinja"
MAX_CHARACTERS = 600  # longer texts are truncated


def page(records: Sequence[RunRecord], broken: Sequence[str] = ()) -> str:
    """Return one HTML document, which has no scripts and loads no other files.

    Without matplotlib, the page has no charts and says how to install matplotlib.

    Args:
        records: The runs to show.
        broken: An error message for each further run, which cannot be shown.

    Raises:
        ReportError: The report.json of a run does not have the content that this version writes.
    """
    try:
        renderer: ChartRenderer | None = ChartRenderer()
    except ImportError:
        renderer = None
    names = run_names(records)
    views = []
    for record, name in zip(records, names, strict=True):
        with _unexpected_content(record):
            views.append(run_view(record, name, renderer))
    values = {
        "runs": views,
        "broken": broken,
        "compared": comparison_view(records, names, renderer) if len(records) > 1 else None,
        "mark": Markup(MARK),
        "install": None if renderer else INSTALL,
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"shown": _shown, "number": _number}
    template = environment.get_template(TEMPLATE)
    with _unexpected_content(*records):
        return redacted(template.render(**values))


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


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
