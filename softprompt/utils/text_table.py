"""Plain-text tables for a terminal, where a Chinese character is two columns wide."""

import shutil
import unicodedata
from collections.abc import Sequence

GAP = 2  # columns of the terminal between two cells
NARROWEST = 8  # cells are not shortened to less than this


def table(rows: Sequence[Sequence[str]], width: int | None = None) -> str:
    """Format rows as aligned columns; the first row is the header.

    Args:
        width: The most columns of the terminal that the table may occupy; the longest cells are shortened until it
            fits. None: no limit.
    """
    widths = [max(display_width(row[i]) for row in rows) for i in range(len(rows[0]))]
    if width is not None:
        most = max(max(widths), NARROWEST)
        while most > NARROWEST and sum(min(most, one) + GAP for one in widths) - GAP > width:
            most -= 1
        rows = [[shortened(cell, most) for cell in row] for row in rows]
        widths = [max(display_width(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        (" " * GAP).join(cell + " " * (width - display_width(cell)) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    rule = (" " * GAP).join("─" * width for width in widths)
    return "\n".join([lines[0].rstrip(), rule, *(line.rstrip() for line in lines[1:])])


def shortened(text: str, width: int) -> str:
    """Return the text if it occupies at most `width` columns of a terminal, else its beginning and "…"."""
    if display_width(text) <= width:
        return text
    used = 0
    for end, character in enumerate(text):
        used += display_width(character)
        if used > width - 1:
            return text[:end] + "…"
    return text


def terminal_width() -> int:
    """Return the number of columns of the terminal; 100 if the output is not shown on one."""
    return shutil.get_terminal_size((100, 24)).columns


def display_width(text: str) -> int:
    """Return how many columns of a terminal a text occupies."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
