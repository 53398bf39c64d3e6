"""Format the results of adapters that were evaluated side by side, in the language of the user."""

from collections.abc import Iterator, Mapping, Sequence

from softprompt.evaluation.side_by_side import AdapterResult
from softprompt.evaluation.verdict import verdict
from softprompt.utils.text_table import table
from softprompt.utils.translation import translate

METRICS = (
    *("loss", "loss, 95 % interval", "perplexity", "exact match"),
    *("accuracy (most likely label)", "accuracy, 95 % interval", "macro F1"),
)
MAY_BE_SEEN = (
    "nothing here says whether an adapter was trained on these rows; if it was, they do not show that it is better"
)


def comparison_report(results: Mapping[str, AdapterResult], notes: Sequence[str] = ()) -> str:
    """Return a table with a column for each adapter and a row for each metric that any of them has. Below it follow the
    notes of the results and the given `notes`; if the bare base was evaluated too, a verdict on each adapter; each
    adapter's confusion matrix; and a note on the rows whose answer is none of the choices."""
    metrics = zip(METRICS, *map(_metrics, results.values()), strict=True)
    known = [(translate(name), *values) for name, *values in metrics if set(values) != {"–"}]
    parts = [table([("", *results), *known])]
    others = map(translate, [*notes, *_majority_note(results)])
    if lines := [*_row_notes(results), *others, *_verdicts(results)]:
        parts.append("\n".join(lines))
    for name, result in results.items():
        if classification := result.evaluation.classification:
            (corner, *labels), *rows = classification.confusion_matrix.text_rows
            parts.append(f"{name}{translate(': ').rstrip()}\n{table([(translate(corner), *labels), *rows])}")
    return "\n\n".join([*parts, *map(translate, _other_answers_note(next(iter(results.values()))))])


def _metrics(result: AdapterResult) -> Iterator[str]:
    """Yield the value of each of METRICS, which is a dash if it does not apply."""
    evaluation, classification = result.evaluation, result.evaluation.classification
    perplexity, match = evaluation.perplexity, evaluation.exact_match
    # The passages of a plain text are not independent samples, so their loss has no interval.
    losses, shares = evaluation.loss_interval if result.rows else None, evaluation.accuracy_interval
    matrix = classification and classification.confusion_matrix
    yield f"{evaluation.loss:.4f}"
    yield losses.as_losses() if losses else "–"
    yield "–" if perplexity is None else f"{perplexity:,.4g}"
    yield "–" if match is None else f"{match:.1%}"
    yield f"{matrix.accuracy:.1%}" if matrix else "–"
    yield shares.as_shares() if shares else "–"
    yield f"{matrix.macro_f1:.3f}" if matrix else "–"


def _row_notes(results: Mapping[str, AdapterResult]) -> list[str]:
    """Return the notes on the rows: once if they are the same for all adapters, else each with the adapter's name."""
    distinct = {tuple(result.notes) for result in results.values()}
    if len(distinct) == 1:
        return list(map(translate, distinct.pop()))
    return [_of_adapter(name, note) for name, result in results.items() for note in result.notes]


def _of_adapter(name: str, told: str) -> str:
    return f"{name}{translate(': ')}{translate(told)}"


def _majority_note(results: Mapping[str, AdapterResult]) -> list[str]:
    """Return a note on the accuracy of always giving the most common answer; an empty list if there are no labels."""
    classification = next(iter(results.values())).evaluation.classification
    if not classification:
        return []
    label, share = classification.majority
    return [f"always answering {label} has an accuracy of {share:.1%}"]


def _verdicts(results: Mapping[str, AdapterResult]) -> Iterator[str]:
    """Yield for each adapter whether it is better than the bare base; nothing if the base was not evaluated on the same
    rows. If one is better, say what that rests on."""
    bare = next((result for result in results.values() if result.adapter.prompt is None), None)
    if bare is None or not bare.rows:
        return
    some_better = False
    for name, result in results.items():
        same_rows = result is not bare and _targets(result) == _targets(bare)
        if same_rows and (found := verdict(result.evaluation, bare.evaluation)):
            some_better |= found.better
            yield _of_adapter(name, found.sentence)
    if some_better:
        yield translate(MAY_BE_SEEN)


def _targets(result: AdapterResult) -> list[tuple[int, int]]:
    """Return for each evaluated row its index in the dataset and its number of targets."""
    return list(zip(result.data.kept, result.evaluation.row_targets, strict=True))


def _other_answers_note(result: AdapterResult) -> list[str]:
    """Return a note on the rows whose answer is none of the choices; an empty list if there are none."""
    classification = result.evaluation.classification
    if not classification:
        return []
    others = [answer for answer in classification.expected if answer not in classification.labels]
    if not others:
        return []
    return [
        f"{len(others):,} of {len(classification.expected):,} rows have an answer that is none of the choices, the "
        f"first {others[0]!r:.80}; they count as wrong"
    ]
