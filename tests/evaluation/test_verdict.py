"""What is said about a prompt, from evaluations made by hand."""

import random

import pytest

from softprompt.evaluation.classifier import Classification
from softprompt.evaluation.evaluator import Evaluation, Rival
from softprompt.evaluation.verdict import FEWEST_ROWS, verdict
from softprompt.generation.likelihood import ChoiceResult

WAYS = ["train longer", "start from TEXT", "take a larger base"]


def classified(expected: list[str], predicted: list[str]) -> Evaluation:
    results = [ChoiceResult(label, {}) for label in predicted]
    losses = [0.1 if a == b else 2.0 for a, b in zip(expected, predicted, strict=True)]
    return Evaluation(losses, [2] * len(expected), classification=Classification(["正面", "负面"], expected, results))


def wrong_at(expected: list[str], rows: set[int]) -> Evaluation:
    """An evaluation that takes these rows for the other label."""
    other = {"正面": "负面", "负面": "正面"}
    return classified(expected, [other[label] if row in rows else label for row, label in enumerate(expected)])


EXPECTED = ["正面"] * 63 + ["负面"] * 37
HALF = wrong_at(EXPECTED, set(range(0, 100, 2)))


def test_a_prompt_that_gives_nearly_always_the_same_label_is_not_better():
    """As found with hotel reviews: 61 % right, while always answering 正面 is right for 63 %."""
    after = wrong_at(EXPECTED, {0, 1, 2, 3, *range(65, 100)})
    found = verdict(after, wrong_at(EXPECTED, set(range(25, 100))), WAYS)
    assert not found.better
    assert "always answering 正面: train longer, start from TEXT, or take a larger base" in found.sentence
    assert "base alone" not in found.sentence and "worse" not in found.sentence.lower()


def test_a_prompt_is_better_if_it_beats_both():
    found = verdict(wrong_at(EXPECTED, {0, 1, 70, 71}), HALF, WAYS)
    assert found.better and "base alone" in found.sentence and "always answering 正面" in found.sentence
    assert not any(way in found.sentence for way in WAYS)


def test_a_prompt_must_beat_the_most_likely_label_of_the_base():
    good = {0, 1, 70, 71}
    same = verdict(wrong_at(EXPECTED, good), wrong_at(EXPECTED, good), WAYS)
    assert not same.better and "not better than the base alone" in same.sentence.lower()
    worse = verdict(wrong_at(EXPECTED, {*range(10), *range(70, 75)}), wrong_at(EXPECTED, set()), WAYS)
    assert not worse.better and "worse than the base alone" in worse.sentence.lower()


def test_each_of_several_losses_is_named():
    """As in a distillation, where a prompt is also compared with the cut text."""
    chance = random.Random(0)
    after, before, cut = (
        Evaluation([loss + chance.random() / 10 for _ in range(40)], [2] * 40) for loss in (0.1, 2.0, 1.0)
    )
    found = verdict(after, before, WAYS, [Rival("the cut text", "cut", "_cut", cut)])
    parts = found.sentence.split("; ")
    assert found.better and len(parts) == 2
    assert "than that of the base alone" in parts[0] and "than that of the cut text" in parts[1]
    assert "than that of" not in verdict(after, before, WAYS).sentence


def test_a_lead_that_may_be_chance_asks_for_more_rows():
    ahead = verdict(wrong_at(EXPECTED, {0, 1, *range(66, 100)}), wrong_at(EXPECTED, set(range(50, 100))), WAYS)
    assert not ahead.better and "hold out more rows" in ahead.sentence
    behind = verdict(wrong_at(EXPECTED, {0, 1, 2, *range(65, 100)}), HALF, WAYS)
    assert "hold out more rows" not in behind.sentence


@pytest.mark.parametrize("rows", [1, 4, FEWEST_ROWS - 1])
def test_a_few_rows_decide_nothing(rows):
    expected = ["正面", "负面"] * rows
    right, wrong = wrong_at(expected[:rows], set()), wrong_at(expected[:rows], set(range(rows)))
    found = verdict(right, wrong, WAYS)
    assert not found.better and f"hold out at least {FEWEST_ROWS}" in found.sentence
    found = verdict(texts([0.1] * rows), texts([3.0] * rows))
    assert not found.better and f"hold out at least {FEWEST_ROWS}" in found.sentence


def texts(losses: list[float]) -> Evaluation:
    return Evaluation(losses, [1 + row % 3 for row in range(len(losses))])


def test_free_text_is_compared_row_by_row():
    """The losses of rows differ far more than the two losses of a row do, and those decide."""
    chance = random.Random(1)
    before = [chance.uniform(1, 30) for _ in range(50)]
    gains = [chance.uniform(-0.1, 0.4) for _ in before]
    better = verdict(texts([loss - gain for loss, gain in zip(before, gains, strict=True)]), texts(before), WAYS)
    assert better.better and "95 % interval 0." in better.sentence
    worse = verdict(texts([loss + gain for loss, gain in zip(before, gains, strict=True)]), texts(before), WAYS)
    assert not worse.better and "worse than the base alone: train longer" in worse.sentence.lower()
    noise = [chance.gauss(0, 0.3) for _ in before]
    same = verdict(texts([loss + one for loss, one in zip(before, noise, strict=True)]), texts(before), WAYS)
    assert not same.better and "not better than the base alone: train longer" in same.sentence.lower()


def answered(losses: list[float], expected: list[str], right: int) -> Evaluation:
    """An evaluation of short answers that are no labels, of which the first `right` ones are right."""
    correct = [row < right for row in range(len(expected))]
    return Evaluation([1.0 * loss for loss in losses], [2] * len(losses), expected, correct, expected=expected)


@pytest.mark.parametrize(
    ("expected", "right", "better"),
    [
        (["正面"] * 40, 30, False),  # one label alone: always giving it is right for all rows
        ([""] * 20 + ["正面", "负面"] * 10, 21, False),
        ([""] * 20 + ["正面", "负面"] * 10, 40, True),
        ([f"label {row % 20}" for row in range(80)], 0, False),
        ([f"answer {row}" for row in range(40)], 0, True),  # answers of their own have no most common one
    ],
)
def test_a_lower_loss_alone_is_no_success_where_answers_repeat(expected, right, better):
    losses = [3.0 + row % 5 for row in range(len(expected))]
    before, after = answered(losses, expected, 0), answered([loss / 2 for loss in losses], expected, right)
    assert verdict(after, before).better == better


def test_rows_that_were_trained_on_do_not_count():
    """A prompt that knows half of the rows by heart, and gives always the same label elsewhere, is of no use."""
    learned = {*range(20), *range(63, 93)}
    seen = [row in learned for row in range(100)]
    by_heart = wrong_at(EXPECTED, set(range(93, 100)))
    assert verdict(by_heart, HALF, WAYS).better and verdict(by_heart, HALF, WAYS, seen=[False] * 100).better
    found = verdict(by_heart, HALF, WAYS, seen=seen)
    assert not found.better and "50 of 100" in found.sentence and "always answering 正面: train" in found.sentence
    good = verdict(wrong_at(EXPECTED, set()), HALF, WAYS, seen=seen)
    assert good.better and "50 of 100" in good.sentence
    few = verdict(wrong_at(EXPECTED, set()), HALF, WAYS, seen=[row > 10 for row in range(100)])
    assert not few.better and "89 of 100" in few.sentence and f"hold out at least {FEWEST_ROWS}" in few.sentence
    none = verdict(wrong_at(EXPECTED, set()), HALF, WAYS, seen=[True] * 100)
    assert not none.better and "hold out other rows" in none.sentence


def test_losses_of_rows_that_were_trained_on_do_not_count():
    before, seen = texts([3.0 + row % 5 for row in range(60)]), [row < 30 for row in range(60)]
    after = texts([loss / 9 if known else loss + 0.1 for loss, known in zip(before.row_losses, seen, strict=True)])
    assert verdict(after, before).better and not verdict(after, before, WAYS, seen=seen).better


def test_nothing_is_said_of_losses_that_are_not_finite():
    assert verdict(texts([float("nan")] * 30), texts([1.0] * 30)) is None
