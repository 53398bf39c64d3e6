"""What a study's figures say about a few claims, by one rule. Pure arithmetic on finished cells.

The figure is the held-out loss, on a logarithmic scale, so that tasks of different difficulty can be put together: a
gain of g means a loss of e^-g times the other. Cells are compared that differ in nothing but what the claim is about,
the seed included, each at the learning rate that was best for it (the mean over seeds decides) of those that all of
them were run at, if there is any, else of its own. Every comparison is one observation; from n of them come the mean
gain and its 95 % interval (Student's t with n - 1 degrees of freedom).

A claim holds if the whole interval is above 0; it does not hold if the whole interval is below `LEAST`, so that the
gain is none or too small to matter; all else is not decided by this data.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean

from softprompt.arguments import DEFAULT_LEARNING_RATES
from softprompt.intervals import interval
from softprompt.points import Point, at_best_rate, grouped, without

LEAST = 0.01  # a gain: one percent of the loss
ARTICLE_RATE = 5e-5
HOLDS, HOLDS_NOT, UNDECIDED = "holds", "does not hold", "not decided by this data"


@dataclass(frozen=True)
class Finding:
    """A claim, its verdict, and the sentence that says why. Gains are logarithms of the ratio of two losses."""

    claim: str
    verdict: str
    sentence: str
    gains: tuple[float, ...] = ()


def findings(points: Sequence[Point]) -> list[Finding]:
    """A sentence on each claim that the cells say anything about."""
    best = at_best_rate(points)
    return [
        _along(points, "Longer prompts train better", "virtual tokens", lambda p: p.virtual_tokens),
        _hard_against_soft(points, best),
        _text_against_random(points),
        _larger_bases(points),
        _along(points, "More rows train better", "rows", lambda p: p.rows),
        *_learning_rates(points),
        *_together(points, best),
    ]


def verdict(gains: Sequence[float]) -> str:
    """The rule that this module's docstring states."""
    _, low, high = interval(gains)
    return HOLDS if low > 0 else HOLDS_NOT if high < LEAST else UNDECIDED


def _along(points: Sequence[Point], claim: str, what: str, value: Callable[[Point], int]) -> Finding:
    """Of a number: the gain with each doubling, the slope of the least-squares line over its logarithm."""
    field = {"virtual tokens": "virtual_tokens", "parameters": "base"}.get(what, what)
    slopes: list[float] = []
    points = at_best_rate(points, field)
    for same in grouped(points, without(field, "learning_rate")).values():
        xs, ys = [math.log2(value(p)) for p in same], [-_log(p.loss) for p in same]
        spread = sum((x - mean(xs)) ** 2 for x in xs)
        if spread:
            slopes.append(sum((x - mean(xs)) * y for x, y in zip(xs, ys, strict=True)) / spread)
    values = sorted({value(p) for p in points})
    measured = f"doubling the {what} ({_number(values[0])} to {_number(values[-1])})" if values else what
    return _finding(claim, slopes, measured)


def _larger_bases(points: Sequence[Point]) -> Finding:
    claim = "Larger bases train better"
    trained = [p for p in points if p.trained]
    if any(len({p.targets for p in same}) > 1 for same in grouped(trained, lambda p: (p.dataset, p.context)).values()):
        said = "the bases cut the held-out answers into different tokens, so their losses cannot be compared"
        return Finding(claim, UNDECIDED, f"{claim}: {UNDECIDED} ({said}).")
    return _along(points, claim, "parameters", lambda p: p.parameters)


def _text_against_random(points: Sequence[Point]) -> Finding:
    gains: list[float] = []
    points = at_best_rate([p for p in points if p.init in ("TEXT", "RANDOM")], "init", "start")
    for same in grouped(points, without("init", "start", "learning_rate")).values():
        of = grouped(same, lambda p: p.init)
        pairs = itertools.product(of.get("TEXT", []), of.get("RANDOM", []))
        gains += [_log(random.loss) - _log(text.loss) for text, random in pairs]
    claim = "A prompt that starts from a text (TEXT) trains better than one that starts from noise (RANDOM)"
    return _finding(claim, gains, "TEXT in place of RANDOM")


def _hard_against_soft(points: Sequence[Point], best: Sequence[Point]) -> Finding:
    """The best of the texts beside every seed of the trained setting that is best, for each base, dataset (with as many
    held-out targets) and rows."""
    claim = "A hard prompt (a text put before the input, not trained) is better than a trained soft one"
    texts = grouped([p for p in points if not (p.trained or p.voting)], lambda p: (p.base, p.dataset, p.targets))
    gains: list[float] = []
    for (*asked, _), soft in grouped(best, lambda p: (p.base, p.dataset, p.targets, p.rows)).items():
        if tuple(asked) in texts:
            hard = min(p.loss for p in texts[tuple(asked)])
            settings = grouped(soft, without("seed", "learning_rate")).values()
            chosen = min(settings, key=lambda cells: mean(p.loss for p in cells))
            gains += [_log(p.loss) - _log(hard) for p in chosen]
    return _finding(claim, gains, "the best text in place of the best trained prompt")


def _learning_rates(points: Sequence[Point]) -> list[Finding]:
    """The default of each start beside the rate that is best by the other seeds, and beside the article's."""
    trained = [p for p in points if p.trained]
    gains, beside_article = [], []
    for same in grouped(trained, without("learning_rate", "seed")).values():
        by_rate = {rate: {p.seed: p.loss for p in cells} for rate, cells in grouped(same, _rate).items()}
        default = by_rate.get(DEFAULT_LEARNING_RATES[same[0].init], {})
        article = by_rate.get(ARTICLE_RATE, {})
        others = {rate: losses for rate, losses in by_rate.items() if losses.keys() >= default.keys()}
        for seed, loss in default.items():
            if seed in article:
                beside_article.append(_log(article[seed]) - _log(loss))
            if len(others) > 1 and len(default) > 1:
                chosen = min(others, key=lambda r: mean(v for s, v in others[r].items() if s != seed))
                gains.append(_log(loss) - _log(others[chosen][seed]))
    return [
        _finding(
            "Another learning rate than this project's default is better",
            gains,
            "the rate that is best on the other seeds in place of the default",
        ),
        _finding(
            f"This project's default learning rates are better than the article's {ARTICLE_RATE:g}",
            beside_article,
            f"the default in place of {ARTICLE_RATE:g}",
        ),
    ]


def _together(points: Sequence[Point], best: Sequence[Point]) -> Iterator[Finding]:
    """Each ensemble beside its members, which are all at the rate that was best for them."""
    members = grouped(best, without("seed"))
    pairs = [(p, members[key]) for p in points if p.voting and (key := without("seed")(p)) in members]
    for voting, some in grouped(pairs, lambda pair: pair[0].voting).items():
        claim = f"Prompts of several seeds are better together ({voting}) than one of them"
        lower = [_log(mean(p.loss for p in alone)) - _log(one.loss) for one, alone in some]
        yield _finding(f"{claim}, by their loss", lower, "the mean of their likelihoods in place of the average prompt")
        right = [
            (one.exact_match, [p.exact_match for p in alone if p.exact_match is not None])
            for one, alone in some
            if one.exact_match is not None
        ]
        for name, of in (("average", mean), ("best", max)):
            gains = [share - of(shares) for share, shares in right]
            if gains:
                measured = f"the elected answer in place of the {name} prompt's"
                yield _finding(f"{claim}, by the {name} one's exact match", gains, measured, "exact match", _points)


def _log(loss: float) -> float:
    return math.log(max(loss, 1e-12))  # a loss may round to nothing


def _rate(p: Point) -> float:
    return p.learning_rate


def _finding(
    claim: str,
    gains: Sequence[float],
    measured: str,
    figure: str = "held-out loss",
    change: Callable[[float], str] | None = None,
) -> Finding:
    """`change` says what a gain means for the figure."""
    change = change or _percent
    found = verdict(gains)
    if not gains:
        return Finding(claim, UNDECIDED, f"{claim}: {UNDECIDED} (no cells of the study can be compared).")
    average, low, high = interval(gains)
    if not all(map(math.isfinite, gains)):
        why = "some of its runs did not end in finite numbers"
    elif len(gains) < 2:
        why = f"{measured} changed the {figure} by {change(average)}, in a single comparison"
    else:
        ends = " to ".join(map(change, (high, low) if change is _percent else (low, high)))
        why = f"{measured} changed the {figure} by {change(average)} (95 % interval {ends}; n = {len(gains)})"
    return Finding(claim, found, f"{claim}: {found}; {why}.", tuple(gains))


def _percent(gain: float) -> str:
    """The change of a loss that a gain means."""
    return f"{_tenths(100 * math.expm1(-gain))} %" if gain > -20 else "more than a millionfold"


def _points(gain: float) -> str:
    return f"{_tenths(100 * gain)} points"


def _tenths(value: float) -> str:
    return f"{round(value, 1) + 0:+.1f}"  # no -0.0


def _number(value: float) -> str:
    return f"{value / 1e6:.1f} M" if value >= 1e6 else f"{value:,}"
