"""Tables: as plain text for a terminal, where a Chinese character is two columns wide, and as HTML for a notebook."""

import re
import shutil
import unicodedata
from collections.abc import Iterator, Sequence
from html import escape

Rows = Sequence[Sequence[str]]
OPENING, CLOSING = "（《“‘", "，。；：！？、）》”’…"  # Chinese punctuation that does not end, or begin, a line
UNBROKEN = 12  # a word of at most this many columns is not broken between Chinese characters
WIDE = "\u2e80-\u9fff"  # Chinese characters, between which a line may be broken
PIECE = re.compile(rf"[{OPENING}]*(?:[{WIDE}][,.;:!?)]*|[^{WIDE}{OPENING}{CLOSING}]+|(?=[{CLOSING}])|$)[{CLOSING}]*")
GAP = 2  # columns of the terminal between two cells
NARROWEST = 8  # minimum width to which cells are shortened


def html_table(rows: Rows) -> str:
    """Format rows as an HTML table; the first row is the header."""
    head, *body = [[escape(cell) for cell in row] for row in rows]
    lines = ["".join(f"<td>{cell}</td>" for cell in row) for row in body]
    lines = ["".join(f'<th style="text-align: left">{cell}</th>' for cell in head), *lines]
    return "\n".join(["<table>", *(f"<tr>{line}</tr>" for line in lines), "</table>"])


def table(rows: Rows, width: int | None = None) -> str:
    """Format rows as aligned columns; the first row is the header.

    Args:
        width: The most columns of the terminal that the table may occupy; the longest cells are shortened until it
            fits. None: no limit.
    """
    if width is not None:
        rows = _fitting(rows, width)
    rule = ["─" * most for most in _widths(rows)]
    return aligned([rows[0], rule, *rows[1:]])


def aligned(rows: Rows) -> str:
    """Format rows as aligned columns without a header."""
    widths = _widths(rows)
    lines = [
        (" " * GAP).join(cell + " " * (width - display_width(cell)) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _fitting(rows: Rows, width: int) -> Rows:
    """Return the rows with their longest cells shortened until the table fits into `width` columns."""
    widths = _widths(rows)
    most = max(max(widths), NARROWEST)
    while most > NARROWEST and sum(min(most, one) + GAP for one in widths) - GAP > width:
        most -= 1
    return [[shortened(cell, most) for cell in row] for row in rows]


def _widths(rows: Rows) -> list[int]:
    return [max(display_width(row[i]) for row in rows) for i in range(len(rows[0]))]


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


def wrap(text: str, width: int, hanging: str = "") -> list[str]:
    """Break a text at white space, or between Chinese characters, into lines of at most `width` columns; a longer word
    has a line of its own. The indentation of the text is kept, and the lines after the first begin with `hanging`."""
    lines, line = list[str](), text[: len(text) - len(text.lstrip())]
    for space, piece in _pieces(text):
        longer = line + space + piece if line.strip() else line + piece
        if line.strip() and display_width(longer) > width:
            lines.append(line)
            longer = hanging + piece
        line = longer
    return [*lines, line]


def _pieces(text: str) -> Iterator[tuple[str, str]]:
    """Yield the parts of a text before which a line may be broken, each with the space before it."""
    for word in text.split():
        pieces = [piece for piece in PIECE.findall(word) if piece] if display_width(word) > UNBROKEN else [word]
        yield from zip([" ", *[""] * (len(pieces) - 1)], pieces, strict=True)
