"""What a study's figures say about a few hypotheses, each tested by one rule."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, NamedTuple

from softprompt.config.train_args import DEFAULT_LEARNING_RATES
from softprompt.study.results import Point, at_best_rate, grouped, lowest, without


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and the ends of its 95 % interval; all of the line for fewer than two values or where one is not finite."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return (mean(values) if values and all(map(math.isfinite, values)) else math.nan), -math.inf, math.inf
    half = student_t(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return mean(values), mean(values) - half, mean(values) + half


@functools.cache
def student_t(degrees: int, share: float = 0.975) -> float:
    """The value below which a Student-t variable lies with probability `share`: its density summed by Simpson's rule,
    and the value found by halving."""
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)

    def density(x: float) -> float:
        return scale * (1 + x * x / degrees) ** (-(degrees + 1) / 2)

    def below(x: float, steps: int = 2000) -> float:
        width = x / steps
        inner = sum((4 if i % 2 else 2) * density(i * width) for i in range(1, steps))
        return 0.5 + width / 3 * (density(0) + inner + density(x))

    low, high = 0.0, 100.0
    for _ in range(50):
        low, high = ((low + high) / 2, high) if below((low + high) / 2) < share else (low, (low + high) / 2)
    return low


LEAST = 0.01  # a gain: one percent of the loss
ARTICLE_RATE = 5e-5
HOLDS, HOLDS_NOT, UNDECIDED = "holds", "does not hold", "not decided by this data"


class Compared(NamedTuple):
    """One comparison: `what` was compared, which is the same for every seed, the seed, and the gain."""

    what: Any
    seed: int
    gain: float


@dataclass(frozen=True)
class Finding:
    """A claim, its verdict, and the sentence that says why. `gains` are those of all comparisons (logarithms of the
    ratio of two losses, or differences of two shares), `by_seed` their mean for each seed."""

    claim: str
    conclusion: str
    sentence: str
    gains: tuple[float, ...] = ()
    by_seed: tuple[float, ...] = ()


def evaluate_hypotheses(points: Sequence[Point]) -> list[Finding]:
    """A sentence on each claim that the cells say anything about. Cells that failed are left out."""
    points = [p for p in points if not p.failed]
    return [
        _along(points, "Longer prompts train better", "virtual tokens", lambda p: p.virtual_tokens),
        _hard_against_soft(points),
        _text_against_random(points),
        _larger_bases(points),
        _along(points, "More rows train better", "rows", lambda p: p.rows),
        *_learning_rates(points),
        *_together(points),
    ]


def conclusion(by_seed: Sequence[float]) -> str:
    """The rule that this module's docstring states, of the mean gain with each seed."""
    _, low, high = t_interval(by_seed)
    return HOLDS if low > 0 else HOLDS_NOT if high < LEAST else UNDECIDED


def of_every_seed(compared: Sequence[Compared]) -> list[Compared]:
    """The largest part in which every comparison was made with every seed: else the average of one seed would be over
    other comparisons than that of another."""
    seeds = {what: frozenset(one.seed for one in some) for what, some in grouped(compared, lambda c: c.what).items()}

    def size(some: frozenset[int]) -> tuple[int, int]:
        return (len(some) - 1) * sum(some <= each for each in seeds.values()), len(some)  # degrees of freedom

    whole = max(dict.fromkeys(seeds.values()), key=size, default=frozenset[int]())
    return [one for one in compared if one.seed in whole and whole <= seeds[one.what]]


def _along(points: Sequence[Point], claim: str, what: str, value: Callable[[Point], int]) -> Finding:
    """Of a number: the gain with each doubling, the slope of the least-squares line over its logarithm."""
    field = {"virtual tokens": "virtual_tokens", "parameters": "base"}.get(what, what)
    slopes: list[Compared] = []
    points = at_best_rate(points, field)
    apart = without(field, "learning_rate", "seed")
    for (*key, seed), same in grouped(points, lambda p: (apart(p), p.seed)).items():
        values = [value(p) for p in same]
        xs, ys = list(map(math.log2, values)), [-_log(p.loss) for p in same]
        spread = sum((x - mean(xs)) ** 2 for x in xs)
        if spread:
            slope = sum((x - mean(xs)) * y for x, y in zip(xs, ys, strict=True)) / spread
            slopes.append(Compared((*key, *sorted(values)), seed, slope))
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
    gains: list[Compared] = []
    points = at_best_rate([p for p in points if p.init in ("TEXT", "RANDOM")], "init", "start")
    for key, same in grouped(points, without("init", "start", "learning_rate", "seed")).items():
        of = grouped(same, lambda p: p.init)
        for text, random in itertools.product(of.get("TEXT", []), of.get("RANDOM", [])):
            if text.seed == random.seed:
                gain = _log(random.loss) - _log(text.loss)
                gains.append(Compared((key, text.start, random.start), text.seed, gain))
    claim = "A prompt that starts from a text (TEXT) trains better than one that starts from noise (RANDOM)"
    return _finding(claim, gains, "TEXT in place of RANDOM")


def _hard_against_soft(points: Sequence[Point]) -> Finding:
    """The best of the texts beside the trained setting that is best by the other seeds, for each base, dataset and
    number of rows, on the same held-out rows."""
    claim = "A hard prompt (a text put before the input, not trained) is better than a trained soft one"
    texts = grouped([p for p in points if not (p.trained or p.voting)], _asked)
    gains: list[Compared] = []
    for (asked, rows), soft in grouped([p for p in points if p.trained], lambda p: (_asked(p), p.rows)).items():
        if asked in texts:
            hard = min(p.loss for p in texts[asked])
            settings = list(grouped(soft, without("seed")).values())
            for seed in dict.fromkeys(p.seed for p in soft):
                chosen = lowest([cells for cells in settings if any(p.seed == seed for p in cells)], left_out=seed)
                (one,) = (p for p in chosen if p.seed == seed)
                gains.append(Compared((asked, rows), seed, _log(one.loss) - _log(hard)))
    return _finding(claim, gains, "the best text in place of the best trained prompt")


def _asked(p: Point) -> Any:
    """Of which base what is asked. As many targets alone may be those of other rows."""
    return p.base, p.dataset, p.targets, p.held_out


def _learning_rates(points: Sequence[Point]) -> list[Finding]:
    """The default of each start beside the rate that is best by the other seeds, and beside the article's."""
    trained = [p for p in points if p.trained]
    gains, beside_article = list[Compared](), list[Compared]()
    for key, same in grouped(trained, without("learning_rate", "seed")).items():
        by_rate = {rate: {p.seed: p.loss for p in cells} for rate, cells in grouped(same, _rate).items()}
        default = by_rate.get(DEFAULT_LEARNING_RATES[same[0].init], {})
        article = by_rate.get(ARTICLE_RATE, {})
        others = {rate: losses for rate, losses in by_rate.items() if losses.keys() >= default.keys()}
        for seed, loss in default.items():
            if seed in article:
                beside_article.append(Compared(key, seed, _log(article[seed]) - _log(loss)))
            if len(others) > 1 and len(default) > 1:
                chosen = min(others, key=lambda r: mean(others[r][s] for s in default if s != seed))
                gains.append(Compared(key, seed, _log(loss) - _log(others[chosen][seed])))
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


def _together(points: Sequence[Point]) -> Iterator[Finding]:
    """Each ensemble beside its members, which are all at the rate that was best for them. All of a study's ensembles
    are of one set of seeds."""
    members = grouped(at_best_rate(points), without("seed"))
    pairs = [(p, alone) for p in points if p.voting and len(alone := members.get(without("seed")(p), [])) == p.members]
    for voting, some in grouped(pairs, lambda pair: pair[0].voting).items():
        claim = f"Prompts of several seeds are better together ({voting}) than one of them"
        lower = [Compared(one, one.seed, _log(mean(p.loss for p in alone)) - _log(one.loss)) for one, alone in some]
        measured = "the mean of their likelihoods in place of the average prompt"
        yield _finding(f"{claim}, by their loss", lower, measured, drawn="set of seeds")
        right = [
            (one, one.exact_match, [p.exact_match for p in alone if p.exact_match is not None])
            for one, alone in some
            if one.exact_match is not None
        ]
        for name, of in (("average", mean), ("best", max)):
            gains = [Compared(one, one.seed, share - of(shares)) for one, share, shares in right]
            if gains:
                told = f"{claim}, by the {name} one's exact match"
                measured = f"the elected answer in place of the {name} prompt's"
                yield _finding(told, gains, measured, "exact match", _points, drawn="set of seeds")


def _log(loss: float) -> float:
    return math.log(max(loss, 1e-12))  # a loss may round to nothing


def _rate(p: Point) -> float:
    return p.learning_rate


def _finding(
    claim: str,
    compared: Sequence[Compared],
    measured: str,
    figure: str = "held-out loss",
    change: Callable[[float], str] | None = None,
    drawn: str = "seed",
) -> Finding:
    """`change` says what a gain means for the figure; `drawn` is what each average is of."""
    change = change or _percent
    if not compared:
        return Finding(claim, UNDECIDED, f"{claim}: {UNDECIDED} (no cells of the study can be compared).")
    kept = of_every_seed(compared)
    gains = tuple(one.gain for one in kept)
    by_seed = tuple(mean(one.gain for one in some) for some in grouped(kept, lambda one: one.seed).values())
    finite = all(math.isfinite(one.gain) for one in compared)
    found, (average, low, high) = conclusion(by_seed) if finite else UNDECIDED, t_interval(by_seed)
    made = f"{len(gains):,} comparison" + "s" * (len(gains) > 1)
    if not finite:
        why = "some of its runs did not end in finite numbers"
    elif len(by_seed) < 2:
        better = f"a gain in {sum(gain > 0 for gain in gains):,} of {made}"
        why = f"{measured} changed the {figure} by {change(average)} ({better}; one {drawn} gives no interval)"
    else:
        ends = " to ".join(map(change, (high, low) if change is _percent else (low, high)))
        n = f"n = {len(by_seed)} seeds, {made}"
        why = f"{measured} changed the {figure} by {change(average)} (95 % interval {ends}; {n})"
    if left := len(compared) - len(kept):
        why += f"; {left:,} more were left out, as not every seed has them"
    return Finding(claim, found, f"{claim}: {found}; {why}.", gains, by_seed)


def _percent(gain: float) -> str:
    """The change of a loss that a gain means."""
    return f"{_tenths(100 * math.expm1(-gain))} %" if gain > -20 else "more than a millionfold"


def _points(gain: float) -> str:
    return f"{_tenths(100 * gain)} points"


def _tenths(value: float) -> str:
    return f"{round(value, 1) + 0:+.1f}"  # no -0.0


def _number(value: float) -> str:
    return f"{value / 1e6:.1f} M" if value >= 1e6 else f"{value:,}"
