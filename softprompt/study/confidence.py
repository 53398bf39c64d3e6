"""Confidence intervals of a mean, by Student's t distribution."""

import math
from collections.abc import Sequence
from statistics import NormalDist, mean, stdev

# 97.5 % quantiles of Student's t for 1, 2, … degrees of freedom.
T_QUANTILES = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


def t_quantile(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t distribution with `degrees` (at least 1) degrees of freedom.

    For more degrees of freedom than the table has, it uses an expansion around the normal quantile (Abramowitz and
    Stegun, Handbook of Mathematical Functions, 26.7.5), whose error is below 0.01 % there.
    """
    if degrees <= len(T_QUANTILES):
        return T_QUANTILES[degrees - 1]
    z = NormalDist().inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, start=1))


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of `values` and both ends of its 95 % confidence interval.

    The ends are infinite if there are fewer than two values or one of them is not finite. The mean is NaN if there are
    no values or one of them is not finite.
    """
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return (mean(values) if values and all(map(math.isfinite, values)) else math.nan), -math.inf, math.inf
    half = t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return mean(values), mean(values) - half, mean(values) + half
