"""What a study leaves to read: a table of means and spreads, for the terminal, as CSV and in a page with the rest."""

import csv
import io
import re
from collections.abc import Callable, Iterable, Sequence
from statistics import mean, stdev
from string import punctuation

from softprompt.study.hypotheses import HOLDS, HOLDS_NOT, LEAST, UNDECIDED, Finding
from softprompt.study.results import Point, grouped, other_settings, without

RULE = (
    "Compared are cells that differ in nothing but what a claim is about, the seed included, each at the learning rate "
    "that was best for it, of those that all of them were run at, if there is any. A comparison's gain is the "
    "logarithm of the ratio of the two held-out losses. Comparisons of one seed are not independent, so their gains "
    "are averaged first; the 95 % interval (Student's t) is that of the mean of the seeds' averages, and a single seed "
    f"has none. A claim *{HOLDS}* if the interval lies above 0; it *{HOLDS_NOT}* if the interval "
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
FAILED = "failed"


def table_of(points: Sequence[Point]) -> list[list[str]]:
    """A head and a line for each setting: what varies, the number of seeds, mean ± standard deviation over them. For
    every base and dataset (and template or held-out rows, where these vary) the line without a prompt comes first, then
    texts that are not trained."""
    others, bare = other_settings(points), _bare_losses(points)
    cells = {**COLUMNS, "other settings": lambda p: _line(others(p))}
    shown = [name for name, cell in cells.items() if name in ALWAYS or len(set(map(cell, points))) > 1]
    lines = [[*shown, "seeds", "held-out loss", "exact match"]]
    for here in grouped(points, lambda p: (*_asked(p), f"{bare[p]:.4f}")).values():
        lines.append(_bare(min(here, key=lambda p: bool(p.failed)), shown))
        in_order = sorted(here, key=lambda p: bool(p.trained or p.voting))
        for same in grouped(in_order, lambda p: (p.trained, p.voting, without("seed")(p))).values():
            seeds = max(len(same), same[0].members)
            lines.append([*(cells[name](same[0]) for name in shown), str(seeds), _losses(same), _exact(same)])
    return lines


def failures(points: Sequence[Point]) -> list[str]:
    """Each reason for which cells failed, with their number."""
    of_reasons = grouped([p for p in points if p.failed], lambda p: p.failed)
    return [
        f"{len(some):,} cell{'s' * (len(some) > 1)}, the first {_named(some[0])}: {_line(why)}"
        for why, some in of_reasons.items()
    ]


def csv_of(points: Iterable[Point]) -> bytes:
    """A line for each cell."""
    names = [name for name in Point.__dataclass_fields__]
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(names)
    writer.writerows([getattr(p, name) for name in names] for p in points)
    return text.getvalue().encode()


def page(
    head: Sequence[str],
    table: Sequence[Sequence[str]],
    found: Iterable[Finding],
    pictures: Iterable[str],
    failed: Sequence[str] = (),
) -> bytes:
    """Markdown; `head` are its first paragraphs, `failed` is of `failures`."""
    lines = [line for text in head if text for line in (text.strip(), "")]
    if failed:
        lines += ["## Cells that failed", "", "They are left out of the findings and the pictures.", ""]
        lines += [*(f"- {_marked(text)}" for text in failed), ""]
    lines += ["## Findings", "", *(f"- {finding.sentence}" for finding in found), "", RULE, ""]
    if names := list(pictures):
        lines += ["## Pictures", "", "Means over the seeds; the bars are a standard deviation to either side.", ""]
        lines += [f"![held-out loss over {name.removesuffix('.svg').split('-')[-1]}]({name})" for name in names] + [""]
    top, *rest = table
    lines += ["## Table", "", "Mean ± standard deviation over the seeds.", ""]
    lines += [_row(top), "|" + "---|" * len(top), *map(_row, rest), ""]
    return "\n".join(lines).encode()


def _asked(p: Point) -> tuple[str, str, str]:
    return p.base, p.dataset, p.held_out


def _bare_losses(points: Sequence[Point]) -> dict[Point, float]:
    """Of each point, the loss without a prompt; of one that failed, that of another on the same held-out rows."""
    known = {_asked(p): p.base_loss for p in reversed(points) if not p.failed}
    return {p: known.get(_asked(p), p.base_loss) if p.failed else p.base_loss for p in points}


def _bare(p: Point, shown: Sequence[str]) -> list[str]:
    """The line of a base and a dataset without a prompt."""
    told = {"base": p.base, "dataset": p.dataset, "start": "no prompt"}
    exact = f"{p.base_exact_match:.1%}{_of_rows(p)}" if p.base_exact_match is not None else ""
    loss = FAILED if p.failed else _spread([p.base_loss], "{:.4f}")
    return [*(told.get(name, "") for name in shown), "", loss, exact]


def _losses(same: Sequence[Point]) -> str:
    """Mean and spread of the cells that did not fail."""
    left = [p.loss for p in same if not p.failed]
    if not left:
        return FAILED
    failed = len(same) - len(left)
    return _spread(left, "{:.4f}") + (f" ({failed} {FAILED})" if failed else "")


def _exact(same: Sequence[Point]) -> str:
    left = [p for p in same if not p.failed]
    values = [p.exact_match for p in left if p.exact_match is not None]
    return _spread(values, "{:.1%}") + _of_rows(left[0]) if values and len(values) == len(left) else ""


def _of_rows(p: Point) -> str:
    """Over how many rows an exact match is, where it is not over all."""
    return "" if p.exact_match_rows is None else f" of {p.exact_match_rows:,} rows"


def _spread(values: Sequence[float], form: str) -> str:
    if float("inf") in values:
        return "not finite"
    return form.format(mean(values)) + (f" ± {form.format(stdev(values))}" if len(values) > 1 else "")


def _named(p: Point) -> str:
    """A cell by what is in its line of the table, and its seed."""
    told = [f"{name} {text}" for name, cell in COLUMNS.items() if (text := cell(p))]
    return ", ".join([*told, *([f"seed {p.seed}"] if p.trained else [])])


def _line(text: str) -> str:
    """A text without line breaks and other control characters."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: repr(found[0])[1:-1], text)


def _row(cells: Sequence[str]) -> str:
    """Of a Markdown table."""
    return "| " + " | ".join(map(_marked, cells)) + " |"


def _marked(text: str) -> str:
    """A text whose Markdown marks are letters like others."""
    return re.sub(MARKS, r"\\\g<0>", text)
