"""Plain-text tables for a terminal, where a Chinese character is two columns wide."""

import unicodedata
from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows as aligned columns; the first row is the header."""
    widths = [max(display_width(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell + " " * (width - display_width(cell)) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    rule = "  ".join("─" * width for width in widths)
    return "\n".join([lines[0].rstrip(), rule, *(line.rstrip() for line in lines[1:])])


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
