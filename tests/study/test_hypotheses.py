"""The rule by which results decide a hypothesis, and which cells are compared."""

import math
import random
from dataclasses import replace

import pytest

from softprompt.config.train_args import RANDOM_LEARNING_RATE
from softprompt.study.findings import (
    HOLDS,
    HOLDS_NOT,
    UNDECIDED,
    UNTESTED,
    Comparison,
    balanced_over_seeds,
    conclusion,
    t_interval,
    t_quantile,
)
from softprompt.study.hypotheses import evaluate_hypotheses
from softprompt.study.results import CellResult, at_best_learning_rate, without_copies

ONE = CellResult(
    "b", 1000, "d", "RANDOM", 10, RANDOM_LEARNING_RATE, 100, 0, True, "", 1, 1.0, None, 4.0, None, 50, "", "{}"
)
LENGTHS, TEXTS, STARTS, BASES, ROWS, DEFAULT, ARTICLE = range(7)  # of the findings


def points(*changes, **same):
    return [replace(ONE, **{**same, **change}) for change in changes]


def seeds(loss, wobble=0.01, n=3, **given):
    return points(*({"seed": s, "loss": loss * math.exp(wobble * (s - 1))} for s in range(n)), **given)


@pytest.mark.parametrize(
    "degrees, value",
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (10, 2.2281), (11, 2.2010), (30, 2.0423), (120, 1.9799), (10**6, 1.9600)],
)
def test_t_quantiles_are_those_of_printed_tables(degrees, value):
    assert t_quantile(degrees) == pytest.approx(value, abs=2e-4)


@pytest.mark.parametrize(
    "gains, expected",
    [
        ([0.30, 0.31, 0.29], HOLDS),
        ([0.012, 0.013, 0.011], HOLDS),
        ([-0.3, -0.31, -0.29], HOLDS_NOT),
        ([0.0, 0.001, -0.001], HOLDS_NOT),  # no gain that would matter
        ([0.3, -0.1, 0.2], UNDECIDED),
        ([0.02, 0.0, 0.01], UNDECIDED),
        ([0.3], UNDECIDED),
        ([], UNDECIDED),
        ([0.3, 0.31, math.inf], UNDECIDED),
    ],
)
def test_conclusions(gains, expected):
    assert conclusion(gains) == expected


def test_the_interval_is_that_of_student_t():
    average, low, high = t_interval([1.0, 2.0, 4.0])
    half = 4.3027 * math.sqrt(7 / 3) / math.sqrt(3)  # the sample variance is 7/3
    assert (average, low, high) == pytest.approx((7 / 3, 7 / 3 - half, 7 / 3 + half), abs=1e-3)


def test_a_longer_prompt_that_halves_the_loss_with_each_doubling():
    cells = [p for tokens, loss in ((1, 8.0), (2, 4.0), (8, 1.0)) for p in seeds(loss, virtual_tokens=tokens)]
    found = evaluate_hypotheses(cells)[LENGTHS]
    assert found.conclusion == HOLDS
    assert found.gains == pytest.approx([math.log(2)] * 3)
    assert "(1 to 8) changed the held-out loss by -50.0 %" in found.sentence and "n = 3" in found.sentence


def test_cells_that_differ_in_more_than_the_hypothesis_are_not_compared():
    """They are longer, but also have another initialization, context, number of rows, or seed."""
    others = [{"init": "TEXT"}, {"context": "{1}"}, {"rows": 7}, {"seed": 9}, {"dataset": "e"}, {"base": "c"}]
    cells = points({}, *({"virtual_tokens": 20, "loss": 0.1, **other} for other in others))
    assert evaluate_hypotheses(cells)[LENGTHS].sentence.endswith("(no cells of the study can be compared).")


def test_lengths_are_compared_at_their_best_learning_rates():
    short = [*seeds(2.0, learning_rate=1e-1), *seeds(9.0, learning_rate=1e-3)]
    long = [*seeds(5.0, learning_rate=1e-1, virtual_tokens=20), *seeds(1.0, learning_rate=1e-3, virtual_tokens=20)]
    kept = at_best_learning_rate(short + long)
    assert {(p.virtual_tokens, p.learning_rate) for p in kept} == {(10, 1e-1), (20, 1e-3)}
    assert evaluate_hypotheses(short + long)[LENGTHS].gains == pytest.approx([math.log(2)] * 3)


def test_only_learning_rates_that_all_lengths_have_are_considered():
    short = seeds(2.0, learning_rate=1e-2)
    long = [*seeds(2.0, learning_rate=1e-2, virtual_tokens=20), *seeds(1.0, learning_rate=1e-1, virtual_tokens=20)]
    assert evaluate_hypotheses(short + long)[LENGTHS].gains == pytest.approx([0.0] * 3)
    text = seeds(2.0, init="TEXT", learning_rate=1e-2) + seeds(1.0, init="TEXT", learning_rate=1e-1)
    others = seeds(3.0, init="SAMPLE_VOCAB", learning_rate=1e-3)
    assert evaluate_hypotheses(short + text + others)[STARTS].gains == pytest.approx([0.0] * 3)


def test_the_best_hard_prompt_is_compared_with_the_best_soft_prompt():
    texts = points({"loss": 0.5, "start": "a"}, {"loss": 3.0, "start": "b"}, trained=False, init="TEXT")
    soft = [*seeds(1.0, wobble=0.0), *seeds(2.0, virtual_tokens=1), *seeds(4.0, rows=8, wobble=0.0)]
    found = evaluate_hypotheses(texts + soft)[TEXTS]
    assert found.conclusion == HOLDS
    assert sorted(found.gains) == pytest.approx([math.log(2)] * 3 + [math.log(8)] * 3)
    worse = points({"loss": 2.5}, trained=False, init="TEXT")
    assert evaluate_hypotheses(worse + seeds(1.0))[TEXTS].conclusion == HOLDS_NOT
    elsewhere = points({"loss": 0.1, "dataset": "e"}, trained=False, init="TEXT")
    assert evaluate_hypotheses(elsewhere + seeds(1.0))[TEXTS].conclusion == UNTESTED


def test_text_and_random_initialization():
    cells = seeds(1.0) + seeds(0.5, init="TEXT", start="a text", learning_rate=3e-2)
    assert evaluate_hypotheses(cells)[STARTS].conclusion == HOLDS
    assert evaluate_hypotheses(seeds(1.0) + seeds(0.5, init="TEXT", virtual_tokens=4))[STARTS].gains == ()


def test_starts_are_compared_in_pairs_where_the_study_has_both():
    losses = {"RANDOM": 1.0, "SAMPLE_VOCAB": 0.5, "TEXT": 0.25, "CLASS_LABELS": 2.0}
    cells = [cell for init, loss in losses.items() for cell in seeds(loss, init=init, start=init)]
    found = {f.hypothesis: f for f in evaluate_hypotheses(cells) if "starts from" in f.hypothesis}
    gains = {
        (one, two): f.gains for one in losses for two in losses for h, f in found.items() if _compares(h, one, two)
    }
    expected = {("TEXT", "RANDOM"): 4, ("SAMPLE_VOCAB", "RANDOM"): 2, ("CLASS_LABELS", "RANDOM"): 0.5}
    expected[("TEXT", "SAMPLE_VOCAB")] = 2
    assert gains.keys() == expected.keys() and len(found) == 4
    for pair, ratio in expected.items():
        assert gains[pair] == pytest.approx([math.log(ratio)] * 3)
    few = [cell for cell in cells if cell.init in ("RANDOM", "TEXT")]
    assert sum("starts from" in f.hypothesis for f in evaluate_hypotheses(few)) == 1


def _compares(hypothesis, one, two):
    better, worse = hypothesis.split(" trains better than ")
    return f"({one})" in better and f"({two})" in worse


def test_a_reparameterization_is_compared_with_none_each_at_its_best_learning_rate():
    plain = [*seeds(2.0, learning_rate=1e-1), *seeds(3.0, learning_rate=1e-3)]
    mlp = {"reparameterization": "mlp"}
    other = [*seeds(9.0, **mlp, learning_rate=1e-1), *seeds(1.0, **mlp, learning_rate=1e-3)]
    (found,) = [f for f in evaluate_hypotheses(plain + other) if "mlp" in f.hypothesis]
    assert found.conclusion == HOLDS and found.gains == pytest.approx([math.log(2)] * 3)
    assert len(evaluate_hypotheses(plain)) == len(evaluate_hypotheses(plain + other)) - 1
    alone = seeds(1.0, reparameterization="mlp 64", start="elsewhere")
    assert evaluate_hypotheses(plain + alone)[-1].conclusion == UNTESTED


def test_a_reparameterization_does_not_win_by_rates_that_are_lucky_on_one_seed_each():
    """The best of three rates on each seed would be half as bad as the plain prompt."""
    rates = (1e-1, 1e-2, 1e-3)
    lucky = [
        replace(ONE, reparameterization="mlp", learning_rate=rate, seed=seed, loss=0.5 if at == seed else 1.0)
        for at, rate in enumerate(rates)
        for seed in range(3)
    ]
    (found,) = [f for f in evaluate_hypotheses([*seeds(1.0, wobble=0), *lucky]) if "mlp" in f.hypothesis]
    assert found.gains == pytest.approx([0.0] * 3)


def test_a_rate_without_other_seeds_is_not_chosen_by_its_own_result():
    """As after cells that failed."""
    mlp = {"reparameterization": "mlp"}
    losses = {(1e-1, 1): 2.0, (1e-1, 2): 2.1, (1.0, 1): 1.5, (10.0, 2): 1.5}
    cells = [replace(ONE, **mlp, learning_rate=rate, seed=seed, loss=loss) for (rate, seed), loss in losses.items()]
    (found,) = [
        f for f in evaluate_hypotheses(points({"seed": 1}, {"seed": 2}, loss=2.0) + cells) if "mlp" in f.hypothesis
    ]
    assert found.gains == pytest.approx([0.0, math.log(2 / 2.1)])
    alone = [c for c in cells if c.learning_rate > 0.5]
    (found,) = [
        f for f in evaluate_hypotheses(points({"seed": 1}, {"seed": 2}, loss=2.0) + alone) if "mlp" in f.hypothesis
    ]
    assert found.gains == ()


def test_a_default_rate_that_depends_on_no_base_is_that_of_this_version():
    """Cells store the default of the version that ran them."""
    losses = {RANDOM_LEARNING_RATE: 2.0, 7e-1: 1.0}
    cells = [p for rate, loss in losses.items() for p in seeds(loss, learning_rate=rate, default_learning_rate=7e-1)]
    assert evaluate_hypotheses(cells)[DEFAULT].gains == pytest.approx([math.log(2)] * 3)
    of_words = [replace(p, init="SAMPLE_VOCAB") for p in cells]
    assert evaluate_hypotheses(of_words)[DEFAULT].gains == pytest.approx([0.0] * 3)


def test_a_run_that_two_grids_have_counts_once():
    """Rounding, an error, or the version that ran it may make a difference between the two."""
    failed, old = replace(ONE, failed="why"), replace(ONE, loss=1.01)
    new = replace(ONE, default_learning_rate=1e-1)
    assert without_copies([failed, old, new]) == [new] == without_copies([new, old, failed])
    others = [replace(ONE, seed=1), replace(ONE, trained=False), replace(ONE, voting="majority_vote")]
    assert without_copies([ONE, *others]) == [ONE, *others]


def test_bases_with_different_target_tokens_are_not_compared():
    small, large = seeds(1.0), seeds(0.5, base="c", parameters=4000)
    assert evaluate_hypotheses(small + large)[BASES].gains == pytest.approx([math.log(2) / 2] * 3)
    found = evaluate_hypotheses(small + [replace(p, targets=60) for p in large])[BASES]
    assert found.conclusion == UNDECIDED and "different tokens" in found.sentence


def test_other_held_out_rows_are_not_taken_for_different_target_tokens():
    cells = [replace(p, context=c, targets=t) for p in seeds(1.0) for c, t in (("{1}", 50), ("{2}", 90))]
    assert "no cells of the study can be compared" in evaluate_hypotheses(cells)[BASES].sentence


def test_a_hard_prompt_is_not_compared_on_other_held_out_rows():
    texts = points({"loss": 0.1, "targets": 9}, {"loss": 3.0}, trained=False, init="TEXT")
    assert evaluate_hypotheses(texts + seeds(1.0, wobble=0.0))[TEXTS].gains == pytest.approx([-math.log(3)] * 3)


def test_more_rows():
    assert evaluate_hypotheses(seeds(2.0, rows=8) + seeds(1.0, rows=32))[ROWS].gains == pytest.approx(
        [math.log(2) / 2] * 3
    )


def test_the_best_learning_rate_is_chosen_on_the_other_seeds():
    """Each seed has a rate that happens to be best for it; none of these rates is better than the default."""
    lucky = [
        replace(ONE, seed=s, learning_rate=rate, loss=0.5 if i == s else 2.0)
        for s in range(3)
        for i, rate in enumerate((1e-3, 1e-2, 6e-1))
    ]
    assert evaluate_hypotheses(seeds(1.0, wobble=0.0) + lucky)[DEFAULT].gains == (0.0, 0.0, 0.0)
    one_seeds_luck = [replace(ONE, seed=s, learning_rate=6e-1, loss=loss) for s, loss in enumerate((0.1, 1.2, 1.2))]
    gains = evaluate_hypotheses(seeds(1.0, wobble=0.0) + one_seeds_luck)[DEFAULT].gains
    assert gains == pytest.approx([0.0, -math.log(1.2), -math.log(1.2)])
    better = seeds(0.5, wobble=0.0, learning_rate=6e-1)
    assert evaluate_hypotheses(seeds(1.0, wobble=0.0) + better)[DEFAULT].gains == pytest.approx([math.log(2)] * 3)


def test_the_learning_rate_of_the_article():
    found = evaluate_hypotheses(seeds(1.0) + seeds(3.0, learning_rate=5e-5))[ARTICLE]
    assert found.conclusion == HOLDS and found.gains == pytest.approx([math.log(3)] * 3)


def test_a_loss_that_is_not_finite_leaves_it_undecided():
    cells = seeds(1.0) + points({"loss": math.inf, "virtual_tokens": 20}) + seeds(0.5, virtual_tokens=40)
    found = evaluate_hypotheses(cells)[LENGTHS]
    assert found.conclusion == UNDECIDED and "finite" in found.sentence


def test_an_ensemble_is_compared_with_its_members():
    """The comparison is by the mean loss, and by the exact match of the average and of the best member."""
    alone = points(
        {"seed": 0, "loss": 2.0, "exact_match": 0.5},
        {"seed": 1, "loss": 4.0, "exact_match": 0.7},
        {"seed": 0, "loss": 9.0, "exact_match": 0.1, "learning_rate": 1e-4},  # another rate, and not the best
    )
    together = points({"loss": 1.5, "exact_match": 0.8}, trained=False, voting="majority_vote", members=2)
    worse = points({"loss": 0.1, "learning_rate": 1e-4}, trained=False, voting="majority_vote", members=1)
    by_loss, by_average, by_best = evaluate_hypotheses([*alone, *together, *worse])[ARTICLE + 1 :]
    assert by_loss.gains == pytest.approx([math.log(2)]) and by_average.gains == pytest.approx([0.2])
    assert by_best.gains == pytest.approx([0.1]) and "exact match by +10.0 points" in by_best.sentence
    assert [f.gains for f in evaluate_hypotheses([*alone, *together])[: ARTICLE + 1]] == [
        f.gains for f in evaluate_hypotheses(alone)[: ARTICLE + 1]
    ]
    unmatched = points({"loss": 1.5}, trained=False, voting="mean_likelihood", members=2)
    assert len(evaluate_hypotheses([*alone, *unmatched])) == ARTICLE + 2  # long answers have no exact match


def noise(draw, spread):
    return math.exp(draw.gauss(0, spread))


def texts_beside_noise(draw, seed):
    """Six text initializations and one random one: six gains that share a run."""
    baseline = [replace(ONE, seed=seed, loss=noise(draw, 0.1))]
    return baseline + [
        replace(ONE, seed=seed, init="TEXT", start=str(n), loss=math.exp(-0.2) * noise(draw, 0.02)) for n in range(6)
    ]


def datasets_with_the_same_rows_drawn(draw, seed):
    """Six datasets on which the longer prompt of a seed is equally lucky."""
    luck = noise(draw, 0.1)
    return [
        replace(ONE, seed=seed, dataset=str(n), virtual_tokens=P, loss=(math.exp(-0.2) * luck if P == 20 else 1.0))
        for n in range(6)
        for P in (10, 20)
    ]


def one_default_in_every_comparison(draw, seed):
    """The article's rate and the default, with noise that is the same for all bases of a seed."""
    luck = noise(draw, 0.1)
    return [
        replace(ONE, seed=seed, base=str(n), learning_rate=rate, loss=(math.exp(0.2) * luck if rate == 5e-5 else 1.0))
        for n in range(6)
        for rate in (5e-5, ONE.learning_rate)
    ]


@pytest.mark.parametrize(
    "cells, hypothesis",
    [
        (texts_beside_noise, STARTS),
        (datasets_with_the_same_rows_drawn, LENGTHS),
        (one_default_in_every_comparison, ARTICLE),
    ],
)
def test_a_95_percent_interval_covers_the_truth_in_95_of_100_studies(cells, hypothesis):
    """The true gain is 0.2. Comparisons that share a run or a seed's luck are no independent observations: an interval
    over all of them would hold it far less often."""
    draw, studies, covered = random.Random(0), 300, 0
    for _ in range(studies):
        found = evaluate_hypotheses([p for seed in range(5) for p in cells(draw, seed)])[hypothesis]
        _, low, high = t_interval(found.by_seed)
        covered += low <= 0.2 <= high
    assert 0.92 <= covered / studies <= 0.98


def test_one_seed_leaves_it_undecided():
    cells = [replace(ONE, loss=2.0)]
    cells += [replace(ONE, init="TEXT", start=str(n), loss=1.0 + n / 1e3) for n in range(9)]
    found = evaluate_hypotheses(cells)[STARTS]
    assert found.conclusion == UNDECIDED and len(found.gains) == 9 and len(found.by_seed) == 1
    assert "no interval" in found.sentence and "9 of 9 comparisons" in found.sentence


def test_the_gains_of_a_seed_are_averaged_before_the_interval():
    cells = seeds(1.0, wobble=0.1) + seeds(0.5, wobble=0.0, init="TEXT", start="a")
    cells += seeds(0.4, wobble=0.0, init="TEXT", start="b")
    found = evaluate_hypotheses(cells)[STARTS]
    middle = (math.log(2) + math.log(2.5)) / 2
    assert found.by_seed == pytest.approx([middle - 0.1, middle, middle + 0.1]) and len(found.gains) == 6
    assert "n = 3 seeds, 6 comparisons" in found.sentence


def test_after_a_failed_cell_all_seeds_have_the_same_comparisons():
    """If the hard task fails with one seed, the mean of that seed must not be over the easy task only."""
    easy = [*seeds(1.0, dataset="easy"), *seeds(0.5, dataset="easy", virtual_tokens=20)]
    hard = [*seeds(1.0, dataset="hard"), *seeds(0.9, dataset="hard", virtual_tokens=20)]
    hard[-1] = replace(hard[-1], loss=math.inf, failed="out of memory")
    found = evaluate_hypotheses(easy + hard)[LENGTHS]
    assert found.by_seed == pytest.approx([math.log(2)] * 3) and "2 more were left out" in found.sentence
    assert found.conclusion == HOLDS  # what failed is no loss that is not finite


def test_a_slope_is_over_the_same_lengths_for_every_seed():
    cells = [p for P, loss in ((1, 8.0), (2, 2.0), (4, 1.0)) for p in seeds(loss, virtual_tokens=P)]
    cells[0] = replace(cells[0], loss=math.inf, failed="no")  # else the slope of seed 0 would be the smaller one
    assert evaluate_hypotheses(cells)[LENGTHS].by_seed == pytest.approx([math.log(8) / 2] * 2)


@pytest.mark.parametrize(
    "made, kept",
    [
        ({"a": [0, 1], "b": [0, 1]}, {"a": [0, 1], "b": [0, 1]}),
        ({"a": [0, 1, 2], "b": [0, 1]}, {"a": [0, 1, 2]}),
        ({"a": [0, 1, 2], "b": [0, 1], "c": [0, 1]}, {"a": [0, 1], "b": [0, 1], "c": [0, 1]}),
        ({"a": [0, 1, 2], "b": [0]}, {"a": [0, 1, 2]}),
        ({"a": [0, 1], "b": [1, 2]}, {"a": [0, 1]}),
        ({}, {}),
    ],
)
def test_every_seed_has_the_same_comparisons(made, kept):
    compared = [Comparison(what, seed, 0.0) for what, seeds in made.items() for seed in seeds]
    assert balanced_over_seeds(compared) == [
        Comparison(what, seed, 0.0) for what, seeds in kept.items() for seed in seeds
    ]


def test_learning_rates_are_compared_over_the_seeds_that_all_have():
    """The rate whose worst seed failed has the lower mean of the remaining losses, but is worse on each seed."""
    good = points({"seed": 0, "loss": 1.0}, {"seed": 1, "loss": 3.0})
    bad = points({"seed": 0, "loss": 1.5}, {"seed": 1, "failed": "no"}, learning_rate=1e-3)
    assert {p.learning_rate for p in at_best_learning_rate(good + bad)} == {ONE.learning_rate}


def test_the_best_trained_setting_is_chosen_on_the_other_seeds():
    """Each seed has a length that happens to be best for it."""
    lucky = [
        replace(ONE, seed=s, virtual_tokens=P, loss=0.5 if n == s else 2.0)
        for s in range(3)
        for n, P in enumerate((1, 2, 4))
    ]
    texts = points({"loss": 1.0}, trained=False, init="TEXT")
    assert evaluate_hypotheses(texts + seeds(1.0, wobble=0.0) + lucky)[TEXTS].by_seed == pytest.approx([0.0] * 3)


def test_a_hard_prompt_is_compared_on_its_own_held_out_rows():
    texts = points(
        {"loss": 0.1, "held_out": "other rows"}, {"loss": 3.0, "held_out": "rows"}, trained=False, init="TEXT"
    )
    soft = seeds(1.0, wobble=0.0, held_out="rows")
    assert evaluate_hypotheses(texts + soft)[TEXTS].gains == pytest.approx([-math.log(3)] * 3)


def test_an_ensemble_without_all_its_members_is_not_compared():
    together = points({"loss": 1.5}, trained=False, voting="majority_vote", members=3)
    assert len(evaluate_hypotheses([*seeds(2.0, n=2), *together])) == ARTICLE + 1


def test_ensembles_have_no_interval():
    cells = [p for name in "abcd" for p in seeds(2.0, dataset=name)]
    cells += points(*({"dataset": d, "loss": 1.5} for d in "abcd"), trained=False, voting="majority_vote", members=3)
    found = evaluate_hypotheses(cells)[ARTICLE + 1]
    assert found.conclusion == UNDECIDED and len(found.gains) == 4 and "one set of seeds" in found.sentence
