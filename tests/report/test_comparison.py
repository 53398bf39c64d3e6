"""Several runs side by side, from made-up records."""

import re

from helpers.reported_runs import described_run

from softprompt.report.page import page
from softprompt.runs.run_reader import RunRecord


def made(name: str, loss: float, seconds: float = 3.0, **arguments: object) -> RunRecord:
    run = described_run(name)
    run.facts["arguments"].update(arguments)
    run.results.update(eval_loss=loss, train_runtime=seconds)
    return run


def table(*runs: RunRecord) -> tuple[dict[str, list[str]], str]:
    """The cells of the tables by the names of their rows, and all of the page."""
    html = page(runs)
    found = "".join(re.findall(r'<table class="stack compared .*?</table>', html, re.S))
    rows = re.findall(r"<tr><th>(.*?)</th>(.*?)</tr>", found, re.S)
    return {name: re.findall(r"<td.*?</td>", cells, re.S) for name, cells in rows}, html


def best(cells: list[str]) -> list[bool]:
    return ["best" in cell and "★" in cell for cell in cells]


def test_only_settings_that_differ_are_in_the_table():
    rows, html = table(made("one", 0.5, output_dir="a"), made("two", 0.75, learning_rate=0.01, output_dir="b"))
    assert [re.findall(r"<bdi>(.*?)</bdi>", cell) for cell in rows["learning_rate"]] == [["0.1"], ["0.01"]]
    assert "dataset" not in rows and "output_dir" not in rows and "Caution" not in html


def test_the_best_value_is_marked_and_so_are_equal_ones():
    rows, _ = table(made("one", 0.5), made("two", 0.75), made("three", 0.50000001))
    assert best(rows["held-out loss"]) == [True, False, True]
    assert best(rows["seconds of training"]) == [False] * 3  # no quality of a prompt
    rows, _ = table(made("one", 0.5), made("two", 0.5))
    assert best(rows["held-out loss"]) == [False, False]


def test_where_the_largest_value_is_the_best_it_is_marked():
    runs = made("one", 0.5), made("two", 0.75)
    for run, share in zip(runs, (0.25, 0.75), strict=True):
        run.results["eval_exact_match"] = share
    rows, _ = table(*runs)
    assert best(rows["exact match"]) == [False, True] and best(rows["held-out loss"]) == [True, False]


def test_different_tasks_are_not_ranked():
    rows, html = table(made("one", 0.5), made("two", 0.75, dataset="other.jsonl"))
    assert "Caution" in html and "differ in dataset" in html and best(rows["held-out loss"]) == [False, False]
    shared = {"eval_dataset": "held_out.jsonl"}
    rows, html = table(made("one", 0.5, **shared), made("two", 0.75, dataset="other.jsonl", **shared))
    assert "Caution" not in html and best(rows["held-out loss"]) == [True, False]


def test_losses_of_different_bases_are_not_ranked_but_answers_are():
    runs = made("one", 0.5, model_name_or_path="a"), made("two", 0.75, model_name_or_path="b")
    for run, share in zip(runs, (0.25, 0.75), strict=True):
        run.results["eval_exact_match"] = share
    rows, html = table(*runs)
    assert "Caution" in html and best(rows["exact match"]) == [False, True]
    assert best(rows["held-out loss"]) == [False, False]


def test_a_metric_that_was_measured_once_has_no_chart():
    once = [{"step": 20, "eval_loss": 0.75}]
    assert "<polyline" not in page([described_run("one", history=once), described_run("two", history=once)])
    html = page([described_run("one"), described_run("two", history=once)])
    held_out = re.search(r"<figcaption>Held-out loss</figcaption>.*?</figure>", html, re.S)[0]
    assert held_out.count("<polyline") == 1 and ">two<" not in held_out
