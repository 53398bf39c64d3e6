"""Format the results of adapters that were evaluated side by side."""

from collections.abc import Mapping, Sequence

from softprompt.evaluation.side_by_side import AdapterResult
from softprompt.utils.text_table import table


def comparison_report(results: Mapping[str, AdapterResult], notes: Sequence[str] = ()) -> str:
    """Return a table with a column for each adapter and a row for each metric that any of them has. It is followed by
    the results' notes on the rows, the given `notes`, each adapter's confusion matrix, and a note on rows whose answer
    is none of the choices."""
    metrics: dict[str, list[str]] = {}
    for result in results.values():
        evaluation, matrix = result.evaluation, result.confusion_matrix
        perplexity, match = evaluation.perplexity, evaluation.exact_match
        values = {
            "loss": f"{evaluation.loss:.4f}",
            "perplexity": "–" if perplexity is None else f"{perplexity:,.4g}",
            "exact match": "–" if match is None else f"{match:.1%}",
            "accuracy (likelier label)": "–" if matrix is None else f"{matrix.accuracy:.1%}",
            "macro F1": "–" if matrix is None else f"{matrix.macro_f1:.3f}",
        }
        for name, value in values.items():
            metrics.setdefault(name, []).append(value)
    known = {name: values for name, values in metrics.items() if set(values) != {"–"}}
    parts = [table([["", *results], *([name, *values] for name, values in known.items())])]
    if lines := [*_row_notes(results), *notes]:
        parts.append("\n".join(lines))
    parts += [f"{name}:\n{matrix}" for name, result in results.items() if (matrix := result.confusion_matrix)]
    return "\n\n".join([*parts, *_other_answers_note(next(iter(results.values())))])


def _row_notes(results: Mapping[str, AdapterResult]) -> list[str]:
    """Return the notes on the rows: once if they are the same for all adapters, else each with the adapter's name."""
    distinct = {tuple(result.notes) for result in results.values()}
    if len(distinct) == 1:
        return list(distinct.pop())
    return [f"{name}: {note}" for name, result in results.items() for note in result.notes]


def _other_answers_note(result: AdapterResult) -> list[str]:
    """Return a note on the rows whose answer is none of the choices; an empty list if there are none."""
    if not result.predictions:
        return []
    others = [answer for answer in result.expected if answer not in result.predictions[0].probabilities]
    count = f"{len(others):,} of {len(result.expected):,} rows have an answer that is none of the choices"
    return [f"{count}, the first {others[0]!r:.80}; they count as wrong"] if others else []
