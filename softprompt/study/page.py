"""The readable outputs of a study: a table of means and standard deviations, a CSV file, and a Markdown page."""

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean, stdev
from string import punctuation

from softprompt.evaluation.intervals import Interval
from softprompt.study.findings import HOLDS, HOLDS_NOT, MIN_GAIN, UNDECIDED, Finding, sentences, t_interval
from softprompt.study.results import CellResult, group_by, key_without, varied_context

RULE = (
    "Two cells are compared if they have the same seed and differ only in what the hypothesis is about. Each setting "
    "is taken at its best learning rate, among the rates that all compared settings were run at, if there are any. "
    "When reparameterizations are compared, whose rates are not comparable, each of them and the plain prompt is "
    "taken at the rate that is best on the other seeds; the default rate, too, is compared with that rate. A hard "
    "prompt is compared with the trained prompt whose settings are best on the other seeds; of several hard prompts, "
    "the one with the lowest held-out loss is taken, which favors them. The gain of a comparison is the logarithm of "
    "the ratio of the two held-out losses. Comparisons with the same seed are not independent, so their gains are "
    "averaged first. The 95 % confidence interval (Student's t) is that of the mean of these averages; with a single "
    "seed there is none. The findings show it as a change of the loss, which has the opposite sign. A hypothesis "
    f"*{HOLDS}* if the interval lies above 0; it *{HOLDS_NOT}* if the interval lies below {100 * MIN_GAIN:g} % of the "
    f"loss; otherwise it is *{UNDECIDED}*. For exact match the gain is the difference, and the threshold is one "
    "percentage point."
)
EFFECT = "The change of the metric is followed by its 95 % interval, if there are several seeds."
ACCURACY = (
    "The accuracy is the share of held-out rows whose most likely label is the expected one; in parentheses is its "
    "95 % interval: that over the rows (Wilson, the mean of the seeds), extended to that over the seeds (Student's t). "
    "Ensembles have none."
)
COLUMNS: dict[str, Callable[[CellResult], str]] = {
    "base": lambda r: r.base,
    "dataset": lambda r: r.dataset,
    "start": lambda r: f"{r.init}, {r.voting}" if r.voting else r.init if r.trained else "hard prompt",
    "text or labels": lambda r: _one_line(r.start),
    "reparameterization": lambda r: r.reparameterization,
    "virtual tokens": lambda r: str(r.virtual_tokens),
    "learning rate": lambda r: _rate(r.learning_rate) if r.trained or r.voting else "",
    "rows": lambda r: f"{r.rows:,}" if r.trained or r.voting else "",
}
ALWAYS_SHOWN = ("start", "virtual tokens")
MARKUP = rf"[|<&*`\[]|\\(?=[{re.escape(punctuation)}])"  # characters that Markdown interprets in a line of a table
FAILED = "failed"


def result_table(results: Sequence[CellResult]) -> list[list[str]]:
    """Return a header and one line for each setting, with the mean and standard deviation over its seeds.

    The columns are the settings that vary among the cells, the number of seeds, the held-out loss, the accuracy if the
    answers of any dataset are labels, and the exact match. The accuracy of a single cell and of the base has its 95 %
    interval, and the line of the base the share of the most common label.

    Lines are grouped by base and dataset and, if these vary, by template and choice of held-out rows. In each group,
    the first line is the base without a prompt; hard prompts come next.
    """
    context, base_losses = varied_context(results), _base_losses(results)
    columns = {**COLUMNS, "other settings": lambda r: _one_line(context(r))}
    shown = [name for name, cell in columns.items() if name in ALWAYS_SHOWN or len(set(map(cell, results))) > 1]
    with_accuracy = any(r.base_accuracy is not None for r in results)
    accuracy_column = ["accuracy"] if with_accuracy else []
    lines = [[*shown, "seeds", "held-out loss", *accuracy_column, "exact match"]]
    for group in group_by(results, lambda r: (*_evaluated_on(r), f"{base_losses[r]:.4f}")).values():
        lines.append(_line_without_prompt(group, shown, with_accuracy))
        hard_first = sorted(group, key=lambda r: bool(r.trained or r.voting))
        for cells in group_by(hard_first, lambda r: (r.trained, r.voting, key_without("seed")(r))).values():
            seeds = max(len(cells), cells[0].members)
            values = [columns[name](cells[0]) for name in shown]
            accuracy = [_accuracy(cells)] if with_accuracy else []
            lines.append([*values, str(seeds), _loss(cells), *accuracy, _exact_match(cells)])
    return lines


def failure_lines(results: Sequence[CellResult]) -> list[str]:
    """Return a line for each reason why cells failed, with the number of cells."""
    by_reason = group_by([r for r in results if r.failed], lambda r: r.failed)
    return [
        f"{len(cells):,} cell{'s' * (len(cells) > 1)}, the first {_description(cells[0])}: {_one_line(why)}"
        for why, cells in by_reason.items()
    ]


def csv_bytes(results: Iterable[CellResult]) -> bytes:
    """Return a CSV file with a header and a line for each cell."""
    names = [name for name in CellResult.__dataclass_fields__]
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(names)
    writer.writerows([getattr(r, name) for name in names] for r in results)
    return text.getvalue().encode()


def page(
    head: Sequence[str],
    table: Sequence[Sequence[str]],
    findings: Iterable[Finding],
    charts: Iterable[str],
    failures: Sequence[str] = (),
    by_task: Mapping[str, Iterable[Finding]] | None = None,
) -> bytes:
    """Return the page in Markdown.

    Args:
        head: The first paragraphs; empty ones are left out.
        table: The result of `result_table`.
        findings: The result of `hypotheses.evaluate_hypotheses`.
        charts: Names of image files beside the page.
        failures: The result of `failure_lines`.
        by_task: The result of `hypotheses.evaluate_by_task`.
    """
    lines = [line for text in head if text for line in (text.strip(), "")]
    if failures:
        lines += ["## Cells that failed", "", "They are left out of the findings and the charts.", ""]
        lines += [*(f"- {_escaped(text)}" for text in failures), ""]
    lines += ["## Findings", "", *(f"- {sentence}" for sentence in sentences(findings)), "", RULE, ""]
    lines += _task_lines(by_task or {})
    if names := list(charts):
        lines += ["## Charts", "", "Means over the seeds; the bars are one standard deviation to each side.", ""]
        lines += [f"![held-out loss over {name.removesuffix('.svg').split('-')[-1]}]({name})" for name in names] + [""]
    lines += ["## Table", "", "Mean ± standard deviation over the seeds.", ""]
    if "accuracy" in table[0]:
        lines[-2] += f" {ACCURACY}"
    lines += [*_table_lines(table), ""]
    return "\n".join(lines).encode()


def _task_lines(by_task: Mapping[str, Iterable[Finding]]) -> list[str]:
    """Return a section with a line for each hypothesis that any base and dataset tests, and a column for each task."""
    told = {task: {f.hypothesis: f for f in findings if f.gains} for task, findings in by_task.items()}
    hypotheses = dict.fromkeys(name for findings in told.values() for name in findings)
    if not hypotheses:
        return []
    rows = [[name, *(_short(findings.get(name)) for findings in told.values())] for name in hypotheses]
    table = _table_lines([["hypothesis", *told], *rows])
    return ["## Findings for each base and dataset", "", f"The rule is the same. {EFFECT}", "", *table, ""]


def _short(finding: Finding | None) -> str:
    return ": ".join(filter(None, (finding.conclusion, finding.effect))) if finding else ""


def _rate(learning_rate: float | None) -> str:
    return "default" if learning_rate is None else f"{learning_rate:g}"


def _evaluated_on(r: CellResult) -> tuple[str, str, str]:
    return r.base, r.dataset, r.held_out


def _base_losses(results: Sequence[CellResult]) -> dict[CellResult, float]:
    """Return the loss without a prompt for each cell; a failed cell gets that of a cell with the same held-out rows."""
    known = {_evaluated_on(r): r.base_loss for r in reversed(results) if not r.failed}
    return {r: known.get(_evaluated_on(r), r.base_loss) if r.failed else r.base_loss for r in results}


def _line_without_prompt(group: Sequence[CellResult], shown: Sequence[str], with_accuracy: bool) -> list[str]:
    """Return the line of a base and a dataset without a prompt. `group` are all cells that were evaluated on them; it
    is taken from one that did not fail, and that was evaluated by a version that knew the accuracy, if there is one."""
    r = min(group, key=lambda r: (bool(r.failed), r.base_accuracy is None))
    values = {"base": r.base, "dataset": r.dataset, "start": "no prompt"}
    exact_match = f"{r.base_exact_match:.1%}{_row_count(r)}" if r.base_exact_match is not None else ""
    loss = FAILED if r.failed else _mean_and_deviation([r.base_loss], "{:.4f}")
    accuracy = [_base_accuracy(r)] if with_accuracy else []
    return [*(values.get(name, "") for name in shown), "", loss, *accuracy, exact_match]


def _base_accuracy(r: CellResult) -> str:
    """Return the base's accuracy with its interval, and the share of the most common label."""
    if r.base_accuracy is None:
        return ""
    common = "" if r.majority is None else f"; most common label {r.majority:.1%}"
    return f"{r.base_accuracy:.1%}{_interval(r.base_accuracy_low, r.base_accuracy_high)}{common}"


def _accuracy(cells: Sequence[CellResult]) -> str:
    """Return the mean and standard deviation of the accuracy, and its interval: the mean one over the rows, extended to
    that over the seeds; "" if a cell that did not fail has none."""
    succeeded = [r for r in cells if not r.failed]
    values = [r.accuracy for r in succeeded if r.accuracy is not None]
    if not values or len(values) < len(succeeded):
        return ""
    lows, highs = ([getattr(r, f"accuracy_{end}") for r in succeeded] for end in ("low", "high"))
    low, high = mean(lows), mean(highs)
    if len(values) > 1:
        _, low_of_seeds, high_of_seeds = t_interval(values)
        low, high = min(low, low_of_seeds), max(high, high_of_seeds)
    return _mean_and_deviation(values, "{:.1%}") + _interval(low, high)


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" ({Interval(max(0.0, low), min(1.0, high)).as_shares()})"


def _loss(cells: Sequence[CellResult]) -> str:
    """Return the mean and standard deviation of the cells that did not fail."""
    losses = [r.loss for r in cells if not r.failed]
    if not losses:
        return FAILED
    failed = len(cells) - len(losses)
    return _mean_and_deviation(losses, "{:.4f}") + (f" ({failed} {FAILED})" if failed else "")


def _exact_match(cells: Sequence[CellResult]) -> str:
    succeeded = [r for r in cells if not r.failed]
    values = [r.exact_match for r in succeeded if r.exact_match is not None]
    complete = values and len(values) == len(succeeded)
    return _mean_and_deviation(values, "{:.1%}") + _row_count(succeeded[0]) if complete else ""


def _row_count(r: CellResult) -> str:
    """Return how many rows the exact match covers, or "" if it covers all held-out rows."""
    return "" if r.exact_match_rows is None else f" of {r.exact_match_rows:,} rows"


def _mean_and_deviation(values: Sequence[float], form: str) -> str:
    if float("inf") in values:
        return "not finite"
    return form.format(mean(values)) + (f" ± {form.format(stdev(values))}" if len(values) > 1 else "")


def _description(r: CellResult) -> str:
    """Describe a cell by the values in its line of the table, and its seed."""
    values = [f"{name} {text}" for name, cell in COLUMNS.items() if (text := cell(r))]
    return ", ".join([*values, *([f"seed {r.seed}"] if r.trained else [])])


def _one_line(text: str) -> str:
    """Return a text with escape sequences in place of line breaks and other control characters."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: repr(found[0])[1:-1], text)


def _table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table whose first row is its header."""
    header, *rest = map(_table_line, rows)
    return [header, "|" + "---|" * len(rows[0]), *rest]


def _table_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_escaped, cells)) + " |"


def _escaped(text: str) -> str:
    """Return a text in which Markdown interprets no character."""
    return re.sub(MARKUP, r"\\\g<0>", text)
