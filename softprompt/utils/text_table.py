"""Tables: as plain text for a terminal, where a Chinese character is two columns wide, and as HTML for a notebook."""

import unicodedata
from collections.abc import Sequence
from html import escape

Rows = Sequence[Sequence[str]]


def html_table(rows: Rows) -> str:
    """Format rows as an HTML table; the first row is the header."""
    head, *body = [[escape(cell) for cell in row] for row in rows]
    lines = ["".join(f"<td>{cell}</td>" for cell in row) for row in body]
    lines = ["".join(f'<th style="text-align: left">{cell}</th>' for cell in head), *lines]
    return "\n".join(["<table>", *(f"<tr>{line}</tr>" for line in lines), "</table>"])


def table(rows: Rows) -> str:
    """Format rows as aligned columns; the first row is the header."""
    rule = ["─" * max(display_width(row[i]) for row in rows) for i in range(len(rows[0]))]
    return aligned([rows[0], rule, *rows[1:]])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Format rows as aligned columns without a header."""
    widths = [max(display_width(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell + " " * (width - display_width(cell)) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def display_width(text: str) -> int:
    """Return how many columns of a terminal a text occupies."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def wrap(text: str, width: int, hanging: str = "") -> list[str]:
    """Break a text at white space into lines of at most `width` columns; a longer word has a line of its own. The
    indentation of the text is kept, and the lines after the first begin with `hanging`."""
    lines, line = list[str](), text[: len(text) - len(text.lstrip())]
    for word in text.split():
        longer = f"{line} {word}" if line.strip() else line + word
        if line.strip() and display_width(longer) > width:
            lines.append(line)
            longer = hanging + word
        line = longer
    return [*lines, line]
