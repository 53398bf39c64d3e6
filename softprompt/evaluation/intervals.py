"""The uncertainty of metrics of a few hundred rows: 95 % intervals, and a test of whether two prompts differ."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

# 97.5 % quantiles of Student's t for 1, 2, … degrees of freedom.
T_QUANTILES = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
Z = NormalDist().inv_cdf(0.975)


class Interval(NamedTuple):
    """The ends of a 95 % confidence interval."""

    low: float
    high: float

    def as_losses(self) -> str:
        """Format the ends with the digits of a loss."""
        return f"{self.low:.4f}–{self.high:.4f}"

    def as_shares(self) -> str:
        """Format the ends in percent."""
        return f"{100 * self.low:.1f}–{self.high:.1%}"


def wilson_interval(correct: int, rows: int) -> Interval:
    """Return the 95 % interval of a share that is estimated as correct / rows; `rows` is at least 1.

    It is Wilson's score interval (Journal of the American Statistical Association 22, 1927, pages 209 to 212), which
    also holds for few rows and for shares near 0 and 1.
    """
    share, more = correct / rows, Z * Z / rows
    center = (share + more / 2) / (1 + more)
    half = math.sqrt(more * (share * (1 - share) + more / 4)) / (1 + more)
    return Interval(max(0.0, center - half), min(1.0, center + half))


def ratio_interval(sums: Sequence[float], targets: Sequence[int]) -> Interval | None:
    """Return the 95 % interval of a mean per target: sum(sums) / sum(targets). Return None if there are fewer than two
    rows, or if a value is not finite.

    The targets of one row depend on each other, so rows are the sampling units. The interval uses the variance of a
    ratio estimator (Cochran, Sampling Techniques, 1977, chapter 6), with the quantile of Student's t for rows - 1
    degrees of freedom.

    Args:
        sums: For each row the sum over its targets of the losses, or of the differences between the losses of two
            prompts. Differences give the interval of the mean difference, in which the difficulty of a row for both
            prompts cancels out (Miller, Adding Error Bars to Evals, 2024, arXiv:2411.00640).
        targets: The number of targets of each row.
    """
    n, total = len(sums), sum(targets)
    if n < 2 or not all(map(math.isfinite, sums)):
        return None
    mean = math.fsum(sums) / total
    squares = math.fsum((one - mean * count) ** 2 for one, count in zip(sums, targets, strict=True))
    half = t_quantile(n - 1) * math.sqrt(squares * n / (n - 1)) / total
    return Interval(mean - half, mean + half)


def sign_test(wins: int, losses: int) -> float:
    """Return the two-sided p-value of McNemar's exact test (Psychometrika 12, 1947, pages 153 to 157).

    It is the probability that two equally good classifiers differ at least as much as observed. Rows on which both are
    right or both are wrong say nothing. With fewer than six remaining rows, the p-value is never below 0.05.

    Args:
        wins: Number of rows that only the first classifier gets right.
        losses: Number of rows that only the second one gets right.
    """
    n = wins + losses
    log_half_power = n * math.log(0.5)
    logs = (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * math.fsum(math.exp(log + log_half_power) for log in logs))


def t_quantile(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t distribution with `degrees` (at least 1) degrees of freedom.

    For more degrees of freedom than the table has, it uses an expansion around the normal quantile (Abramowitz and
    Stegun, Handbook of Mathematical Functions, 26.7.5), whose error is below 0.01 % there.
    """
    if degrees <= len(T_QUANTILES):
        return T_QUANTILES[degrees - 1]
    terms = (
        (Z**3 + Z) / 4,
        (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96,
        (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384,
    )
    return Z + sum(term / degrees**power for power, term in enumerate(terms, start=1))
