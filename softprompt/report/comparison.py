"""Several runs side by side: their results, the settings that differ, and whether their figures can be compared."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from softprompt.report.charts import compared_charts
from softprompt.report.results import SHOWN, results, status
from softprompt.runs.run_reader import RunRecord
from softprompt.utils.metrics import Metric
from softprompt.utils.translation import translate

OF_THE_TASK = ("dataset", "dataset_config_name", "dataset_split", "columns", "template", "max_length")
OF_THE_TASK += ("truncation_side", "eval_dataset", "eval_split", "eval_rows", "distill_prompt", "distill_context")
OF_THE_BASE = ("model_name_or_path",)


class Cell(NamedTuple):
    """A cell of the table of results: the value of a run, smaller texts below it, and whether it is the best of all
    runs."""

    value: Any
    notes: Sequence[str] = ()
    best: bool = False


def comparison_view(records: Sequence[RunRecord], names: Sequence[str]) -> dict[str, Any]:
    """Return what the template shows of several runs together; the rows of its tables have one cell for each run."""
    tasks, bases = (_differing(records, settings) for settings in (_task_settings(records), OF_THE_BASE))
    every = list(dict.fromkeys(name for record in records for name in record.arguments))
    differ = [name for name in _differing(records, every) if name != "output_dir"]
    first, others = compared_charts(records, names)
    rows = _result_rows(records, bool(tasks), bool(bases))
    return {
        "status": [Cell(translate(status(record))) for record in records],
        "results": rows,
        "ranked": any(cell.best for _, cells in rows for cell in cells),
        "settings": [(name, [Cell(record.arguments.get(name)) for record in records]) for name in differ],
        "cautions": list(_cautions(tasks, bases)),
        "curves": first,
        "course": others,
    }


def _task_settings(records: Sequence[RunRecord]) -> Sequence[str]:
    """Return the settings that decide which rows are held out. Other training rows do not change them if all runs are
    evaluated on one --eval_dataset."""
    apart = all(record.arguments.get("eval_dataset") for record in records)
    of_training = ("dataset", "dataset_config_name", "dataset_split", "eval_rows")
    return [name for name in OF_THE_TASK if not (apart and name in of_training)]


def _differing(records: Sequence[RunRecord], settings: Sequence[str]) -> list[str]:
    return [name for name in settings if len({repr(record.arguments.get(name)) for record in records}) > 1]


def _cautions(tasks: Sequence[str], bases: Sequence[str]) -> Sequence[str]:
    if tasks:
        return [
            f"The runs have different tasks: they differ in {', '.join(tasks)}. Their losses and their shares of right "
            "answers are of different held-out rows, so none is marked as the best."
        ]
    if bases:
        return [
            "The runs have different bases, which may split a text into different tokens. Losses and perplexities are "
            "per token, so none of them is marked as the best."
        ]
    return []


def _result_rows(records: Sequence[RunRecord], tasks: bool, bases: bool) -> list[tuple[str, list[Cell]]]:
    """Return (label, cells) for each metric that any run has."""
    found = [results(record) for record in records]
    rows = []
    for name, metric in SHOWN.items():
        if not any(name in of_run for of_run in found):
            continue
        comparable = metric.better and not tasks and not (bases and metric.of_tokens)
        best = _best([record.final(name) for record in records], metric) if comparable else None
        cells = []
        for of_run, record in zip(found, records, strict=True):
            result = of_run.get(name)
            notes = [] if result is None else [f"{translate('base alone')} {result.base}"] if result.base else []
            notes += result.notes if result else ()
            value = record.final(name)
            is_best = best is not None and value is not None and metric.form.format(value) == best
            cells.append(Cell(result.value if result else "–", notes, is_best))
        rows.append((metric.label, cells))
    return rows


def _best(values: Sequence[float | None], metric: Metric) -> str | None:
    """Return the best value as text; None if fewer than two runs have one, or all have the same."""
    known = [value for value in values if value is not None]
    shown = {metric.form.format(value) for value in known}
    choose: Callable[[Sequence[float]], float] = max if metric.better > 0 else min
    return metric.form.format(choose(known)) if len(shown) > 1 else None


def run_names(records: Sequence[RunRecord]) -> list[str]:
    """Return the names of the runs' folders, or their full paths if two have the same name."""
    names = [record.name for record in records]
    return names if len(set(names)) == len(names) else [str(record.folder) for record in records]
