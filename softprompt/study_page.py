"""What a study leaves to read: a table of means and spreads, for the terminal, as CSV and in a page with the rest."""

import csv
import io
import re
from collections.abc import Callable, Iterable, Sequence
from statistics import mean, stdev
from string import punctuation

from softprompt.claims import HOLDS, HOLDS_NOT, LEAST, UNDECIDED, Finding
from softprompt.points import Point, grouped, other_settings, without

RULE = (
    "Compared are cells that differ in nothing but what a claim is about, the seed included, each at the learning rate "
    "that was best for it, of those that all of them were run at, if there is any. A comparison's gain is the "
    "logarithm of the ratio of the two held-out losses. A claim "
    f"*{HOLDS}* if the 95 % interval of the mean gain (Student's t) lies above 0; it *{HOLDS_NOT}* if the interval "
    f"lies below {100 * LEAST:g} % of the loss; all else is *{UNDECIDED}*. For exact match the gain is the difference, "
    "and one point is what matters."
)
COLUMNS: dict[str, Callable[[Point], str]] = {
    "base": lambda p: p.base,
    "dataset": lambda p: p.dataset,
    "start": lambda p: f"{p.init}, {p.voting}" if p.voting else p.init if p.trained else "hard prompt",
    "text or labels": lambda p: _line(p.start),
    "virtual tokens": lambda p: str(p.virtual_tokens),
    "learning rate": lambda p: f"{p.learning_rate:g}" if p.trained or p.voting else "",
    "rows": lambda p: f"{p.rows:,}" if p.trained or p.voting else "",
}
MARKS = rf"[|<&*`\[]|\\(?=[{re.escape(punctuation)}])"  # of Markdown, in a line of a table
ALWAYS = ("start", "virtual tokens")


def table_of(points: Sequence[Point]) -> list[list[str]]:
    """A head and a line for each setting: what varies, the number of seeds, mean ± standard deviation over them. For
    every base and dataset (and template or held-out rows, where these vary) the line without a prompt comes first, then
    texts that are not trained."""
    others = other_settings(points)
    cells = {**COLUMNS, "other settings": lambda p: _line(others(p))}
    shown = [name for name, cell in cells.items() if name in ALWAYS or len(set(map(cell, points))) > 1]
    lines = [[*shown, "seeds", "held-out loss", "exact match"]]
    for here in grouped(points, lambda p: (p.base, p.dataset, f"{p.base_loss:.4f}")).values():
        lines.append(_bare(here[0], shown))
        in_order = sorted(here, key=lambda p: bool(p.trained or p.voting))
        for same in grouped(in_order, lambda p: (p.trained, p.voting, without("seed")(p))).values():
            losses, seeds = _spread([p.loss for p in same], "{:.4f}"), max(len(same), same[0].members)
            lines.append([*(cells[name](same[0]) for name in shown), str(seeds), losses, _exact(same)])
    return lines


def csv_of(points: Iterable[Point]) -> bytes:
    """A line for each cell."""
    names = [name for name in Point.__dataclass_fields__]
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(names)
    writer.writerows([getattr(p, name) for name in names] for p in points)
    return text.getvalue().encode()


def page(
    head: Sequence[str], table: Sequence[Sequence[str]], found: Iterable[Finding], pictures: Iterable[str]
) -> bytes:
    """Markdown; `head` are its first paragraphs."""
    lines = [line for text in head if text for line in (text.strip(), "")]
    lines += ["## Findings", "", *(f"- {finding.sentence}" for finding in found), "", RULE, ""]
    if names := list(pictures):
        lines += ["## Pictures", "", "Means over the seeds; the bars are a standard deviation to either side.", ""]
        lines += [f"![held-out loss over {name.removesuffix('.svg').split('-')[-1]}]({name})" for name in names] + [""]
    top, *rest = table
    lines += ["## Table", "", "Mean ± standard deviation over the seeds.", ""]
    lines += [_row(top), "|" + "---|" * len(top), *map(_row, rest), ""]
    return "\n".join(lines).encode()


def _bare(p: Point, shown: Sequence[str]) -> list[str]:
    """The line of a base and a dataset without a prompt."""
    told = {"base": p.base, "dataset": p.dataset, "start": "no prompt"}
    exact = f"{p.base_exact_match:.1%}{_of_rows(p)}" if p.base_exact_match is not None else ""
    return [*(told.get(name, "") for name in shown), "", f"{p.base_loss:.4f}", exact]


def _exact(same: Sequence[Point]) -> str:
    values = [p.exact_match for p in same if p.exact_match is not None]
    return _spread(values, "{:.1%}") + _of_rows(same[0]) if values and len(values) == len(same) else ""


def _of_rows(p: Point) -> str:
    """Over how many rows an exact match is, where it is not over all."""
    return "" if p.exact_match_rows is None else f" of {p.exact_match_rows:,} rows"


def _spread(values: Sequence[float], form: str) -> str:
    if float("inf") in values:
        return "not finite"
    return form.format(mean(values)) + (f" ± {form.format(stdev(values))}" if len(values) > 1 else "")


def _line(text: str) -> str:
    """A text without line breaks and other control characters."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: repr(found[0])[1:-1], text)


def _row(cells: Sequence[str]) -> str:
    """Of a Markdown table, in which a cell's marks are letters like others."""
    return "| " + " | ".join(re.sub(MARKS, r"\\\g<0>", cell) for cell in cells) + " |"
