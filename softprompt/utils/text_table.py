"""Plain-text tables for a terminal, where a Chinese character is two columns wide."""

import unicodedata
from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]]) -> str:
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
