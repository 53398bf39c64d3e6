"""The page, the table and the charts of a study."""

import json
from dataclasses import replace

import pytest

from softprompt.study.charts import charts
from softprompt.study.hypotheses import evaluate_by_task, evaluate_hypotheses
from softprompt.study.page import failure_lines, page, result_table
from softprompt.study.results import CellResult

ONE = CellResult("b", 1000, "d", "RANDOM", 10, 3e-2, 100, 0, True, "", 1, 1.0, None, 4.0, None, 50, "", "{}")


def context(**settings):
    return json.dumps({"template": None, "eval_rows": 5, **settings})


def test_varying_settings_are_a_column():
    results = [replace(ONE, context=context(eval_rows=n), seed=s) for n in (5, 9) for s in (0, 1)]
    (head, _, five, nine) = result_table(results)
    at = head.index("other settings")
    assert (five[at], nine[at]) == ("eval_rows 5", "eval_rows 9")


def test_each_held_out_set_has_a_line_without_prompt():
    results = [replace(ONE, context=context(eval_rows=n), base_loss=loss) for n, loss in ((5, 4.0), (9, 6.0))]
    lines = [line[-2] for line in result_table(results)[1:]]
    assert lines == ["4.0000", "1.0000", "6.0000", "1.0000"]


def test_accuracies_of_a_table():
    classified = replace(ONE, base_accuracy=0.7, base_accuracy_low=0.6, base_accuracy_high=0.8, majority=0.52)
    one = replace(classified, virtual_tokens=3, accuracy=0.9, accuracy_low=0.85, accuracy_high=0.95)
    seeds = [replace(one, virtual_tokens=10, accuracy=share, seed=seed) for seed, share in enumerate((0.8, 0.9))]
    equal = [replace(one, virtual_tokens=8, seed=seed) for seed in range(3)]
    ensemble = replace(classified, trained=False, voting="majority_vote")
    earlier = replace(ONE, virtual_tokens=4)  # the cell of a version that did not know the accuracy
    diverged = replace(classified, virtual_tokens=5, loss=float("inf"))
    head, *lines = result_table([earlier, *seeds, one, *equal, ensemble, diverged])
    assert [line[head.index("accuracy")] for line in lines] == [
        "70.0% (60.0–80.0%); most common label 52.0%",
        *("", "85.0% ± 7.1% (21.5–100.0%)", "90.0% (85.0–95.0%)", "90.0% ± 0.0% (85.0–95.0%)", "", ""),
    ]
    assert all(len(line) == len(head) for line in lines)
    lines = page((), [head, *lines], [], []).decode()
    assert "most likely label" in lines and "most likely label" not in page((), result_table([ONE]), [], []).decode()


def test_texts_in_a_table_are_escaped():
    text = "a|b\\|c <script>x</script> *d*\r\n`e`"
    results = [ONE, replace(ONE, init="TEXT", start=text)]
    lines = page((), result_table(results), [], []).decode().split("\n")
    (line,) = [line for line in lines if "TEXT" in line]
    assert r"| a\|b\\\|c \<script>x\</script> \*d\*\r\n\`e\` |" in line


def test_findings_of_each_task_are_a_table():
    """A longer prompt helps with one dataset and hurts with the other; only one of them has two starts."""
    lengths = [
        replace(ONE, dataset=task, virtual_tokens=P, seed=seed, loss=loss * (1 + seed / 1000))
        for task, losses in (("easy", (1.0, 0.5)), ("hard", (1.0, 2.0)))
        for P, loss in zip((1, 2), losses, strict=True)
        for seed in range(3)
    ]
    starts = [replace(r, init="TEXT", loss=0.25) for r in lengths if r.dataset == "hard" and r.virtual_tokens == 1]
    results = [*lengths, *starts]
    lines = page((), result_table(results), [], [], by_task=evaluate_by_task(results)).decode().split("\n")
    head, _, *table = lines[lines.index("## Findings for each base and dataset") + 4 :][:4]
    assert head == "| hypothesis | b, easy | b, hard |"
    assert table[0].startswith("| Longer prompts train better | holds: -50.0 % (-50.0 % to -50.0 %) | does not hold: +")
    assert "noise (RANDOM) |  | holds: -75.0 % (" in table[1]
    assert evaluate_by_task([r for r in results if r.dataset == "hard"]) == {}
    assert b"for each base" not in page((), result_table(results), [], [])


def test_hypotheses_that_no_cells_test_share_a_line():
    results = [replace(ONE, virtual_tokens=P, loss=1 / P, seed=seed) for P in (1, 2) for seed in range(3)]
    lines = page((), result_table(results), evaluate_hypotheses(results), []).decode().split("\n")
    first, last = (line for line in lines if line.startswith("- "))
    assert first.startswith("- Longer prompts train better: holds; ")
    assert last.startswith("- Not tested") and "; More rows train better; " in last and "Longer" not in last


@pytest.mark.pictures
@pytest.mark.filterwarnings("error::UserWarning")
def test_every_line_of_a_chart_has_its_label():
    texts = ("判断", "costs $5 and $6^{$", "_")
    results = [
        replace(ONE, init="TEXT", start=text, virtual_tokens=P, loss=loss)
        for text, loss in zip(texts, (1.0, 2.0, 3.0), strict=True)
        for P in (1, 10)
    ]
    drawn = (charts(results) or {})["study-virtual_tokens.svg"].decode()
    assert drawn.count('id="LineCollection_') == 2 * len(texts)  # a spread and one in the legend
    assert all(f">{text}</text>" in drawn for text in texts)


@pytest.mark.pictures
def test_labels_that_would_be_equal_are_not_shortened():
    texts = ["这条评论的情感" * 6 + end for end in "ab"]
    results = [
        replace(ONE, base=base, init="TEXT", start=text, virtual_tokens=P)
        for base in ("one/x", "two/x")
        for text in texts
        for P in (1, 10)
    ]
    drawn = (charts(results) or {})["study-virtual_tokens.svg"].decode()
    assert all(f">{base}, {text}</text>" in drawn for base in ("one/x", "two/x") for text in texts)


@pytest.mark.pictures
def test_a_setting_with_a_seed_that_is_not_finite_is_in_no_chart():
    """The mean of the other seeds would flatter it; its line of the table has no mean either."""
    results = [replace(ONE, virtual_tokens=P, seed=s) for P in (1, 3, 10) for s in (0, 1)]
    results[0] = replace(results[0], loss=float("inf"))
    drawn = (charts(results) or {})["study-virtual_tokens.svg"].decode()
    assert ">3</text>" in drawn and ">1</text>" not in drawn


def test_failed_cells_have_lines_and_reasons():
    gone = replace(ONE, loss=float("inf"), base_loss=float("inf"), parameters=0)
    results = [ONE, replace(gone, seed=1, failed="a | b"), replace(gone, base="c", seed=0, failed="no\nroom")]
    first, failed = (
        [line[-2] for line in result_table(results)[1:]][:2],
        [line[-2] for line in result_table(results)[3:]],
    )
    assert first == ["4.0000", "1.0000 (1 failed)"] and failed == ["failed", "failed"]
    told = failure_lines(results)
    assert len(told) == 2 and "seed 1: a | b" in told[0] and "base c" in told[1] and told[1].endswith("no\\nroom")
    lines = page((), result_table(results), [], [], told).decode().split("\n")
    assert any(line.startswith("- 1 cell, the first") and r"a \| b" in line for line in lines)
    drawn = charts(results)
    assert not drawn
