"""Conclusions about hypotheses, all drawn from comparisons of cells by the same rule."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, NamedTuple

from softprompt.evaluation.intervals import t_quantile
from softprompt.study.results import group_by

MIN_GAIN = 0.01  # the smallest gain that matters: one percent of the loss
HOLDS, HOLDS_NOT, UNDECIDED = "holds", "does not hold", "not decided by this data"
UNTESTED = "not tested"


class Comparison(NamedTuple):
    """The gain of one comparison. `what` identifies the compared settings, and is the same for every seed."""

    what: Any
    seed: int
    gain: float


@dataclass(frozen=True)
class Finding:
    """What a study concludes about a hypothesis.

    Args:
        hypothesis: The hypothesis, as a sentence without a full stop.
        conclusion: HOLDS, HOLDS_NOT, UNDECIDED or, if no cells can be compared, UNTESTED.
        sentence: The hypothesis, the conclusion and the reason for it.
        gains: The gain of each comparison: the logarithm of a ratio of losses, or a difference of exact matches.
        by_seed: The mean gain of each seed.
        effect: The mean change of the metric and, with several seeds, its 95 % interval in parentheses; empty if
            nothing was compared or not everything is finite.
    """

    hypothesis: str
    conclusion: str
    sentence: str
    gains: tuple[float, ...] = ()
    by_seed: tuple[float, ...] = ()
    effect: str = ""


def conclusion(by_seed: Sequence[float]) -> str:
    """Return the conclusion from the mean gain of each seed.

    A hypothesis holds if the 95 % confidence interval of the mean over the seeds lies above 0. It does not hold if the
    interval lies below MIN_GAIN. Otherwise it is undecided.
    """
    _, low, high = t_interval(by_seed)
    return HOLDS if low > 0 else HOLDS_NOT if high < MIN_GAIN else UNDECIDED


def balanced_over_seeds(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the largest subset in which every comparison was made with every seed.

    Without this, the means of different seeds would be over different comparisons.
    """
    seeds = {what: frozenset(c.seed for c in group) for what, group in group_by(comparisons, lambda c: c.what).items()}

    def size(subset: frozenset[int]) -> tuple[int, int]:
        return (len(subset) - 1) * sum(subset <= each for each in seeds.values()), len(subset)  # degrees of freedom

    chosen = max(dict.fromkeys(seeds.values()), key=size, default=frozenset[int]())
    return [c for c in comparisons if c.seed in chosen and chosen <= seeds[c.what]]


def finding(
    hypothesis: str,
    comparisons: Sequence[Comparison],
    change: str,
    metric: str = "held-out loss",
    describe: Callable[[float], str] | None = None,
    sampled: str = "seed",
) -> Finding:
    """Return the finding that follows from `comparisons`.

    Args:
        hypothesis: The hypothesis.
        comparisons: The comparisons that test it. Only the balanced ones are used (see `balanced_over_seeds`).
        change: What was changed between the compared cells.
        metric: The metric that changed.
        describe: Formats a gain as the change of the metric. By default, it is the change of the loss in percent.
        sampled: What each of the averaged gains belongs to, such as a seed. The sentence names it if there is only one.
    """
    describe = describe or percent
    if not comparisons:
        return Finding(hypothesis, UNTESTED, f"{hypothesis}: {UNTESTED} (no cells of the study can be compared).")
    kept = balanced_over_seeds(comparisons)
    gains = tuple(c.gain for c in kept)
    by_seed = tuple(mean(c.gain for c in group) for group in group_by(kept, lambda c: c.seed).values())
    finite = all(math.isfinite(c.gain) for c in comparisons)
    found, (average, low, high) = conclusion(by_seed) if finite else UNDECIDED, t_interval(by_seed)
    count = f"{len(gains):,} comparison" + "s" * (len(gains) > 1)
    effect = ""
    if not finite:
        why = "the loss of some runs became infinite or NaN"
    elif len(by_seed) < 2:
        better = f"a gain in {sum(gain > 0 for gain in gains):,} of {count}"
        effect = describe(average)
        why = f"{change} changed the {metric} by {effect} ({better}; one {sampled} gives no interval)"
    else:
        ends = " to ".join(map(describe, (high, low) if describe is percent else (low, high)))
        effect, n = f"{describe(average)} ({ends})", f"n = {len(by_seed)} seeds, {count}"
        why = f"{change} changed the {metric} by {describe(average)} (95 % interval {ends}; {n})"
    if left_out := len(comparisons) - len(kept):
        why += f"; {left_out:,} more were left out, because not every seed has them"
    return Finding(hypothesis, found, f"{hypothesis}: {found}; {why}.", gains, by_seed, effect)


def sentences(findings: Iterable[Finding]) -> list[str]:
    """Return the sentences of findings. All untested hypotheses share one sentence at the end."""
    findings = list(findings)
    untested = [found.hypothesis for found in findings if found.conclusion == UNTESTED]
    tested = [found.sentence for found in findings if found.conclusion != UNTESTED]
    if untested:
        tested.append(f"Not tested, because no cells of the study can be compared: {'; '.join(untested)}.")
    return tested


def percent(gain: float) -> str:
    """Format the relative change of the loss, in percent, that corresponds to a gain (the log of a ratio of losses)."""
    return f"{_one_decimal(100 * math.expm1(-gain))} %" if gain > -20 else "more than a millionfold"


def points(gain: float) -> str:
    """Format a difference of exact matches in percentage points."""
    return f"{_one_decimal(100 * gain)} points"


def _one_decimal(value: float) -> str:
    return f"{round(value, 1) + 0:+.1f}"  # adding 0 turns -0.0 into 0.0


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of `values` and both ends of its 95 % confidence interval.

    The ends are infinite if there are fewer than two values or one of them is not finite. The mean is NaN if there are
    no values or one of them is not finite.
    """
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return (mean(values) if values and all(map(math.isfinite, values)) else math.nan), -math.inf, math.inf
    half = t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return mean(values), mean(values) - half, mean(values) + half
