"""The 95 % intervals and the test of a difference, against their definitions and by simulation."""

import math
import random

import pytest

from softprompt.evaluation.intervals import Interval, Z, ratio_interval, sign_test, t_quantile, wilson_interval


@pytest.mark.parametrize("correct, rows", [(0, 1), (0, 20), (61, 100), (12, 20), (199, 200), (200, 200)])
def test_wilsons_interval_holds_the_shares_that_the_rows_do_not_reject(correct, rows):
    """At each end p, the observed share lies exactly Z standard deviations of a binomial from p."""
    share, ends = correct / rows, wilson_interval(correct, rows)
    assert 0 <= ends.low <= share <= ends.high <= 1
    for end in ends:
        assert abs(share - end) == pytest.approx(Z * math.sqrt(end * (1 - end) / rows), abs=1e-9)


def test_interval_of_a_mean_loss_with_one_target_a_row_is_that_of_student():
    losses = [0.5, 1.25, 3.0, 0.75]
    mean = sum(losses) / 4
    deviation = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / 3)
    half = t_quantile(3) * deviation / 2
    assert ratio_interval(losses, [1] * 4) == pytest.approx((mean - half, mean + half))


def test_interval_of_a_mean_loss_covers_the_true_one():
    """Losses of one row are alike, so that an interval over targets as if they were independent is far too narrow."""
    chance, covered, covered_by_targets, trials = random.Random(0), 0, 0, 400
    for _ in range(trials):
        targets = [chance.randint(1, 9) for _ in range(60)]
        losses = [count * chance.gammavariate(4, 0.25) for count in targets]  # of mean 1 and deviation 0.5 per target
        low, high = ratio_interval(losses, targets)
        covered += low <= 1 <= high
        half = 1.96 * 0.5 / math.sqrt(sum(targets))
        covered_by_targets += abs(sum(losses) / sum(targets) - 1) <= half
    assert covered / trials > 0.92 > 0.75 > covered_by_targets / trials


def test_no_interval_of_a_loss_without_a_spread():
    assert ratio_interval([1.0], [2]) is None
    assert ratio_interval([1.0, math.nan], [2, 2]) is None
    assert ratio_interval([1.0, math.inf], [2, 2]) is None
    assert ratio_interval([2.0, 4.0], [1, 2]) == Interval(2.0, 2.0)


@pytest.mark.parametrize(
    "wins, losses, p", [(0, 0, 1.0), (5, 0, 2 / 32), (0, 6, 2 / 64), (8, 2, 112 / 1024), (3, 3, 1)]
)
def test_sign_test(wins, losses, p):
    assert sign_test(wins, losses) == pytest.approx(p)


def test_sign_test_of_many_rows():
    assert sign_test(50_000, 50_400) > 0.05 > sign_test(50_000, 51_000) > 0
