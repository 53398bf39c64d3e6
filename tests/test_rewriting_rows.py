"""The English task of benchmarks/rewriting_rows.py: its rows follow the rule, and held-out rows are new."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def task(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return import_module("rewriting_rows")


def test_rows_follow_the_rule_and_are_all_different(task):
    train, held_out = task.rewriting_rows(6000, 200)
    assert (len(train), len(held_out)) == (6000, 200)
    assert all(map(task.follows_rule, train + held_out))
    assert len({row["instruction"] for row in train + held_out}) == 6200


def test_held_out_rows_have_verbs_and_objects_that_no_training_row_has_together(task):
    train, held_out = task.rewriting_rows(6000, 200, seed=3)
    seen, new = ({task.verb_and_object(row) for row in rows} for rows in (train, held_out))
    assert new and not seen & new
    for part in (0, 1):  # a prompt has seen each of the words
        assert {pair[part] for pair in new} <= {pair[part] for pair in seen}


def test_the_seed_determines_the_rows(task):
    assert task.rewriting_rows(50, 20, 1) == task.rewriting_rows(50, 20, 1) != task.rewriting_rows(50, 20, 2)


@pytest.mark.parametrize(
    "order, request_, right",
    [
        ("Close the old window.", "Could you please close the old window?", True),
        ("Do not close the old window now.", "Could you please not close the old window now?", True),
        ("Close the old window.", "Could you please not close the old window?", False),
        ("Do not close the old window.", "Could you please close the old window?", False),
        ("Close the old window.", "Could you please close the new window?", False),
        ("Close the old window.", "Could you please close the old window.", False),
        ("Close the old window.", "Could you please Close the old window?", False),
        ("Close the old window.", "Please close the old window.", False),
    ],
)
def test_a_row_is_checked_by_the_rule(order, request_, right, task):
    assert task.follows_rule({"instruction": order, "output": request_}) is right
    assert (task.polite(order) == request_) is right


def test_the_command_writes_held_out_rows_last(task, tmp_path):
    command = [sys.executable, BENCHMARKS / "rewriting_rows.py", tmp_path / "rows.jsonl", "--rows", "30"]
    subprocess.run([*command, "--eval_rows", "5"], check=True)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    train, held_out = task.rewriting_rows(30, 5)
    assert rows == train + held_out
    refused = subprocess.run([*command, "--eval_rows", "99999"], capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "99,999" in refused.stderr
