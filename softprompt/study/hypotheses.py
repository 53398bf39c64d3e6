"""Test a few hypotheses about prompt tuning on the results of a study, all by the same rule.

Two cells are compared if they have the same seed and differ only in what the hypothesis is about. Each setting is taken
at its best learning rate among the rates that all compared settings were run at. Default rates, reparameterizations,
and trained prompts beside hard ones are compared at the rate that is best on the other seeds. The gain of a comparison
is the logarithm of the ratio of the two held-out losses. Comparisons with the same seed are not independent, so their
gains are averaged first, and the 95 % confidence interval is that of the mean of these averages. See
`findings.conclusion` for the rule, and `page.RULE` for its explanation on the page of the study.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from statistics import mean
from typing import Any

from softprompt.config.train_args import default_learning_rate
from softprompt.study.findings import UNDECIDED, Comparison, Finding, finding, points
from softprompt.study.results import CellResult, at_best_learning_rate, best_on_other_seeds, group_by, key_without

PLAIN = "none"  # the reparameterization of a prompt that is trained itself
ARTICLE_RATE = 5e-5  # learning rate of the `article` preset
INITIAL = {
    "RANDOM": "noise (RANDOM)",
    "SAMPLE_VOCAB": "sampled words (SAMPLE_VOCAB)",
    "TEXT": "a text (TEXT)",
    "CLASS_LABELS": "the words of the labels (CLASS_LABELS)",
}


def evaluate_hypotheses(results: Sequence[CellResult]) -> list[Finding]:
    """Return a finding for each hypothesis. Cells that failed are left out."""
    results = [r for r in results if not r.failed]
    return [
        _doubling(results, "Longer prompts train better", "virtual tokens", lambda r: r.virtual_tokens),
        _hard_prompts(results),
        _initialization(results, "TEXT", "RANDOM"),
        _larger_bases(results),
        _doubling(results, "More rows train better", "rows", lambda r: r.rows),
        *_learning_rates(results),
        *_other_initializations(results),
        *_reparameterizations(results),
        *_ensembles(results),
    ]


def evaluate_by_task(results: Sequence[CellResult]) -> dict[str, list[Finding]]:
    """Return the findings of each base and dataset alone, by their names; none if the study has only one of them."""
    groups = group_by(results, lambda r: f"{r.base}, {r.dataset}")
    return {task: evaluate_hypotheses(group) for task, group in groups.items()} if len(groups) > 1 else {}


def _doubling(results: Sequence[CellResult], hypothesis: str, name: str, value: Callable[[CellResult], int]) -> Finding:
    """Test whether a larger number is better. The gain of a doubling is the slope of the least-squares line through
    (log2(value), -log(loss))."""
    field = {"virtual tokens": "virtual_tokens", "parameters": "base"}.get(name, name)
    slopes: list[Comparison] = []
    results = at_best_learning_rate(results, field)
    setting = key_without(field, "learning_rate", "seed")
    for (*key, seed), group in group_by(results, lambda r: (setting(r), r.seed)).items():
        values = [value(r) for r in group]
        xs, ys = list(map(math.log2, values)), [-_log(r.loss) for r in group]
        variance = sum((x - mean(xs)) ** 2 for x in xs)
        if variance:
            slope = sum((x - mean(xs)) * y for x, y in zip(xs, ys, strict=True)) / variance
            slopes.append(Comparison((*key, *sorted(values)), seed, slope))
    values = sorted({value(r) for r in results})
    change = f"doubling the {name} ({_number(values[0])} to {_number(values[-1])})" if values else name
    return finding(hypothesis, slopes, change)


def _larger_bases(results: Sequence[CellResult]) -> Finding:
    hypothesis = "Larger bases train better"
    trained = [r for r in results if r.trained]
    groups = group_by(trained, lambda r: (r.dataset, r.context)).values()
    if any(len({r.targets for r in group}) > 1 for group in groups):
        why = "the bases split the held-out answers into different tokens, so their losses cannot be compared"
        return Finding(hypothesis, UNDECIDED, f"{hypothesis}: {UNDECIDED} ({why}).")
    return _doubling(results, hypothesis, "parameters", lambda r: r.parameters)


def _initialization(results: Sequence[CellResult], init: str, other: str) -> Finding:
    """Compare two initializations, each at its best learning rate."""
    comparisons: list[Comparison] = []
    results = at_best_learning_rate([r for r in results if r.init in (init, other)], "init", "start")
    for key, group in group_by(results, key_without("init", "start", "learning_rate", "seed")).items():
        by_init = group_by(group, lambda r: r.init)
        for one, compared in itertools.product(by_init.get(init, []), by_init.get(other, [])):
            if one.seed == compared.seed:
                gain = _log(compared.loss) - _log(one.loss)
                comparisons.append(Comparison((key, one.start, compared.start), one.seed, gain))
    hypothesis = f"A prompt that starts from {INITIAL[init]} trains better than one that starts from {INITIAL[other]}"
    return finding(hypothesis, comparisons, f"{init} in place of {other}")


def _other_initializations(results: Sequence[CellResult]) -> Iterator[Finding]:
    """Compare initializations that the article does not have, where the study has them."""
    present = {r.init for r in results if r.trained}
    pairs = ("SAMPLE_VOCAB", "RANDOM"), ("CLASS_LABELS", "RANDOM"), ("TEXT", "SAMPLE_VOCAB")
    return (_initialization(results, *pair) for pair in pairs if present.issuperset(pair))


def _hard_prompts(results: Sequence[CellResult]) -> Finding:
    """Compare the best hard prompt with a trained one for each base, dataset, number of rows and seed, on the same
    held-out rows. The trained one has the setting that is best on the other seeds."""
    hypothesis = "A hard prompt (a text put before the input, not trained) is better than a trained soft one"
    hard = group_by([r for r in results if not (r.trained or r.voting)], _evaluated_on)
    comparisons: list[Comparison] = []
    trained = [r for r in results if r.trained]
    for (evaluated_on, rows), soft in group_by(trained, lambda r: (_evaluated_on(r), r.rows)).items():
        if evaluated_on in hard:
            best_hard = min(r.loss for r in hard[evaluated_on])
            for seed, best_soft in best_on_other_seeds(group_by(soft, key_without("seed")).values()).items():
                comparisons.append(Comparison((evaluated_on, rows), seed, _log(best_soft.loss) - _log(best_hard)))
    return finding(hypothesis, comparisons, "the best text in place of the best trained prompt")


def _evaluated_on(r: CellResult) -> Any:
    """Identify the base and the held-out rows. The number of targets alone does not identify the rows."""
    return r.base, r.dataset, r.targets, r.held_out


def _learning_rates(results: Sequence[CellResult]) -> list[Finding]:
    """Compare each initialization's default with the rate that is best on the other seeds, and with the article's."""
    trained = [r for r in results if r.trained]
    other_rates, article_rate = list[Comparison](), list[Comparison]()
    for key, group in group_by(trained, key_without("learning_rate", "seed")).items():
        groups = group_by(group, lambda r: r.learning_rate)
        by_rate = {rate: {r.seed: r.loss for r in cells} for rate, cells in groups.items()}
        default = by_rate.get(_default_rate(group[0]), {})
        article = by_rate.get(ARTICLE_RATE, {})
        candidates = {rate: losses for rate, losses in by_rate.items() if losses.keys() >= default.keys()}
        for seed, loss in default.items():
            if seed in article:
                article_rate.append(Comparison(key, seed, _log(article[seed]) - _log(loss)))
            if len(candidates) > 1 and len(default) > 1:
                best = min(candidates, key=lambda r: mean(candidates[r][s] for s in default if s != seed))
                other_rates.append(Comparison(key, seed, _log(loss) - _log(candidates[best][seed])))
    return [
        finding(
            "A learning rate other than this project's default is better",
            other_rates,
            "the rate that is best on the other seeds in place of the default",
        ),
        finding(
            f"This project's default learning rates are better than the article's {ARTICLE_RATE:g}",
            article_rate,
            f"the default in place of {ARTICLE_RATE:g}",
        ),
    ]


def _default_rate(r: CellResult) -> float | None:
    """Return this version's default; if it depends on the base, the one that was stored when the cell was run."""
    return default_learning_rate(r.init, r.reparameterization.partition(" ")[0]) or r.default_learning_rate


def _reparameterizations(results: Sequence[CellResult]) -> Iterator[Finding]:
    """Compare each reparameterization with a prompt that is trained without one. Each has its own learning rate,
    because rates of different parameters are not comparable: the one that is best on the other seeds, so that more
    rates are no advantage by chance."""
    trained = [r for r in results if r.trained]
    pairs: dict[str, list[Comparison]] = {r.reparameterization: [] for r in trained if r.reparameterization != PLAIN}
    for key, group in group_by(trained, key_without("reparameterization", "learning_rate", "seed")).items():
        kinds = {
            kind: best_on_other_seeds(group_by(cells, lambda r: r.learning_rate).values())
            for kind, cells in group_by(group, lambda r: r.reparameterization).items()
        }
        plain = kinds.pop(PLAIN, {})
        for kind, of_kind in kinds.items():
            for seed in plain.keys() & of_kind.keys():
                gain = _log(plain[seed].loss) - _log(of_kind[seed].loss)
                pairs[kind].append(Comparison(key, seed, gain))
    for kind, comparisons in pairs.items():
        hypothesis = f"A prompt trains better with --prompt_reparameterization {kind}"
        yield finding(hypothesis, comparisons, f"{kind} in place of {PLAIN}")


def _ensembles(results: Sequence[CellResult]) -> Iterator[Finding]:
    """Compare each ensemble with its members, all at the members' best learning rate.

    All ensembles of a study have the same set of seeds, so there is one mean gain and no interval.
    """
    trained = group_by(at_best_learning_rate(results), key_without("seed"))
    pairs = [(r, members) for r in results if r.voting and (members := trained.get(key_without("seed")(r), []))]
    pairs = [(r, members) for r, members in pairs if len(members) == r.members]
    for voting, group in group_by(pairs, lambda pair: pair[0].voting).items():
        hypothesis = f"An ensemble of the prompts of several seeds ({voting}) is better than one of them"
        by_loss = [Comparison(r, r.seed, _log(mean(m.loss for m in members)) - _log(r.loss)) for r, members in group]
        change = "the mean of their likelihoods in place of the average prompt"
        yield finding(f"{hypothesis}, by loss", by_loss, change, sampled="set of seeds")
        matches = [
            (r, r.exact_match, [m.exact_match for m in members if m.exact_match is not None])
            for r, members in group
            if r.exact_match is not None
        ]
        for name, reduce in (("average", mean), ("best", max)):
            comparisons = [Comparison(r, r.seed, match - reduce(of_members)) for r, match, of_members in matches]
            if comparisons:
                title = f"{hypothesis}, by exact match against the {name} one"
                change = f"the ensemble's answer in place of the {name} prompt's"
                yield finding(title, comparisons, change, "exact match", points, sampled="set of seeds")


def _log(loss: float) -> float:
    return math.log(max(loss, 1e-12))  # a loss may underflow to 0


def _number(value: float) -> str:
    return f"{value / 1e6:.1f} M" if value >= 1e6 else f"{value:,}"
