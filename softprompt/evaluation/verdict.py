"""Say by a fixed rule whether a prompt is useful.

Labels         The prompt must classify more rows correctly than the base alone, and than always giving the most common
               answer. Each comparison is McNemar's exact test on the same rows, at 5 %.
Other answers  The prompt must have a lower loss than the base alone: the 95 % interval of the mean difference per
               target token must lie below 0. If exact match is computed and each answer occurs at least twice on
               average, the prompt must also be right for more rows than always giving the most common answer (McNemar's
               test again).

Held-out rows that are equal to a training row are left out of all of this: a prompt may have learned them by heart.
With fewer than FEWEST_ROWS other rows, no prompt is called better.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from softprompt.evaluation.classifier import ROWS_PER_LABEL, Classification
from softprompt.evaluation.evaluator import Evaluation, Rival
from softprompt.evaluation.intervals import ratio_interval, sign_test

FEWEST_ROWS = 20
SIGNIFICANCE = 0.05
LONGEST_LABEL = 40  # characters of a label that the sentence quotes
MORE_ROWS = "hold out more rows"


@dataclass(frozen=True)
class Verdict:
    """Whether a prompt is better than everything that it is compared with, and the sentence that says so."""

    sentence: str
    better: bool


class Comparison(NamedTuple):
    """A prompt compared with something else.

    Attributes:
        rival: What it is compared with.
        advantage: How much better the prompt is on these rows, in any unit; below 0 if it is worse.
        significant: Whether this is unlikely to be chance.
        interval: The 95 % interval of the loss that the prompt saves per target; None if losses are not compared.
    """

    rival: str
    advantage: float
    significant: bool
    interval: tuple[float, float] | None = None


def verdict(
    after: Evaluation,
    before: Evaluation,
    advice: Sequence[str] = (),
    rivals: Sequence[Rival] = (),
    seen: Sequence[bool] = (),
) -> Verdict | None:
    """Judge the prompt whose evaluation is `after`.

    Args:
        before: The evaluation of the base alone on the same rows.
        advice: What to try if the prompt is not better.
        rivals: What else the prompt must be better than.
        seen: For each row, whether it is among the training rows; empty if none is.

    Returns:
        The verdict; None if a loss is not finite, so that nothing can be compared.
    """
    if not any(seen):
        return _verdict_on_unseen(after, before, advice, rivals)
    unseen = [not one for one in seen]
    if not any(unseen):
        return Verdict("Every held-out row is among the training rows, which says nothing: hold out other rows.", False)
    others = [rival._replace(evaluation=rival.evaluation.only(unseen)) for rival in rivals]
    found = _verdict_on_unseen(after.only(unseen), before.only(unseen), advice, others)
    if found is None:
        return None
    count, rows = f"{sum(seen):,}", f"{len(seen):,}"
    sentence = f"Without the {count} of {rows} held-out rows that are among the training rows: {found.sentence}"
    return Verdict(sentence, found.better)


def _verdict_on_unseen(
    after: Evaluation, before: Evaluation, advice: Sequence[str], rivals: Sequence[Rival]
) -> Verdict | None:
    if after.classification and before.classification:
        compared = _compared_labels(after.classification, before.classification)
    else:
        compared = _compared_other_answers(after, before)
    compared += [one for rival in rivals for one in _compared_losses(after, rival.evaluation, rival.name)]
    rows = len(after.row_losses)
    if compared and rows < FEWEST_ROWS:
        rivals = " and than ".join(one.rival for one in compared)
        sentence = (
            f"{rows:,} held-out row{'s are' if rows > 1 else ' is'} too few to tell whether the prompt is better than "
            f"{rivals}: hold out at least {FEWEST_ROWS}."
        )
        return Verdict(sentence, False)
    return _verdict_on(compared, advice) if compared else None


def _compared_labels(after: Classification, before: Classification) -> list[Comparison]:
    base = _compared_answers("the base alone", after.correct, before.correct)
    return [base, _compared_with_constant(after.correct, after.expected)]


def _compared_with_constant(correct: Sequence[bool], expected: Sequence[str]) -> Comparison:
    """Compare a prompt's answers with always giving the most common expected answer."""
    ((label, _),) = Counter(expected).most_common(1)
    always = f"always answering {label}" if len(label) <= LONGEST_LABEL else "always giving the most common answer"
    always = always if label else "always giving an empty answer"
    return _compared_answers(always, correct, [answer == label for answer in expected])


def _compared_answers(rival: str, correct: Sequence[bool], theirs: Sequence[bool]) -> Comparison:
    """Compare two sequences that say of the same rows whether they are answered correctly."""
    wins, losses = (
        sum(ours is right and other is not right for ours, other in zip(correct, theirs, strict=True))
        for right in (True, False)
    )
    return Comparison(rival, wins - losses, sign_test(wins, losses) < SIGNIFICANCE)


def _compared_other_answers(after: Evaluation, before: Evaluation) -> list[Comparison]:
    compared = _compared_losses(after, before)
    answers = zip(after.correct, after.expected, strict=True)
    whole = [(right, expected) for right, expected in answers if right is not None]
    distinct = {expected for _, expected in whole}
    if compared and whole and len(distinct) * ROWS_PER_LABEL <= len(whole):
        correct, expected = zip(*whole, strict=True)
        compared.append(_compared_with_constant(correct, expected))
    return compared


def _compared_losses(after: Evaluation, before: Evaluation, rival: str = "the base alone") -> list[Comparison]:
    gains = [theirs - ours for ours, theirs in zip(after.row_losses, before.row_losses, strict=True)]
    if not math.isfinite(sum(gains)):
        return []
    interval = ratio_interval(gains, after.row_targets)
    if interval is None:  # a single row has no interval
        return [Comparison(rival, sum(gains), False)]
    low, high = interval
    return [Comparison(rival, sum(gains), low > 0 or high < 0, (low, high))]


def _verdict_on(compared: Sequence[Comparison], advice: Sequence[str]) -> Verdict:
    behind = [one for one in compared if one.advantage <= 0 or not one.significant]
    if not behind:
        by_loss = [one for one in compared if one.interval]
        details = "; ".join(_described(one, named=len(by_loss) > 1) for one in by_loss)
        better_than = " and than ".join(one.rival for one in compared)
        return Verdict(f"Better than {better_than}{': ' if details else ''}{details}.", True)
    worse = " and than ".join(one.rival for one in behind if one.significant)
    same = " or than ".join(one.rival for one in behind if not one.significant)
    if worse and same:
        sentence = f"Worse than {worse} and not better than {same}"
    else:
        sentence = f"Worse than {worse}" if worse else f"Not better than {same}"
    # On these rows the prompt is ahead of every rival, so with more rows the difference may become significant.
    ahead = all(one.advantage > 0 for one in behind)
    ways = [*advice, *([MORE_ROWS] if advice and ahead else [])]
    return Verdict(f"{sentence}{': ' if ways else ''}{_either(ways)}.", False)


def _described(one: Comparison, named: bool) -> str:
    """Say how much lower the prompt's loss is; `named` says whether to name what it is compared with."""
    rival, (low, high) = one.rival, one.interval or (0.0, 0.0)
    gain = (low + high) / 2
    if named:
        return f"its loss is lower by {gain:.3g} (95 % interval {low:.3g} to {high:.3g}) than that of {rival}"
    return f"its loss is lower by {gain:.3g} (95 % interval {low:.3g} to {high:.3g})"


def _either(ways: Sequence[str]) -> str:
    """Join what can be done: "a", "a or b", "a, b, or c"."""
    if len(ways) < 3:
        return " or ".join(ways)
    return f"{', '.join(ways[:-1])}, or {ways[-1]}"
