"""What a run says at its end: labels with their fair base, the verdict, rows of each kind; the same in its files."""

import json
from pathlib import Path

import pytest

import softprompt
from softprompt.evaluation import verdict as rules
from softprompt.evaluation.evaluator import Evaluator
from softprompt.training.summary import summary
from softprompt.utils.text_table import display_width

LABELS = ["好", "坏", "中"]
OUTPUTS = [LABELS[0 if n % 4 else 1 + n % 8 // 4] for n in range(32)]
ROWS = [{"instruction": f"第{n}题，" * (1 + n % 4), "output": label} for n, label in enumerate(OUTPUTS)]


@pytest.fixture
def settings(run_settings, tmp_path) -> dict:
    """Settings of a run of 2 steps whose last 24 rows are held out; they have three labels, 18 of the first one."""
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    kept = ("model_name_or_path", "dataset", "output_dir", "per_device_train_batch_size", "tokens_per_microbatch")
    return {**{name: run_settings[name] for name in kept}, "eval_rows": 24, "max_steps": 2}


@pytest.fixture
def run(settings, monkeypatch):
    """The finished run. The base alone answers 坏; with the prompt all are answered 好 except two rows, one rightly."""
    held_out = [row["output"] for row in ROWS[-24:]]

    def answers(self, generator, prompt):
        if prompt is None:
            return ["坏"] * 24
        return [label if row == held_out.index("中") else "好" for row, label in enumerate(held_out)]

    monkeypatch.setattr(Evaluator, "_answers", answers)
    return softprompt.train(**settings)


def tables(run) -> list[list[str]]:
    return [part.splitlines() for part in summary(run).strip("\n").split("\n\n")]


def test_the_table_of_metrics(run):
    figures = {line.split("  ")[0]: line.split() for line in tables(run)[0][2:]}
    metrics = run.metrics
    accuracy = figures["accuracy (most likely label)"]
    shown = [metrics[f"eval_{name}"] for name in ("majority", "accuracy_base", "accuracy")]
    assert accuracy[4:7] == [f"{share:.1%}" for share in shown] and shown[0] == 0.75
    assert accuracy[7] == f"{100 * metrics['eval_accuracy_low']:.1f}–{metrics['eval_accuracy_high']:.1%}"
    assert figures["macro F1"][2:] == [f"{metrics[f'eval_macro_f1{base}']:.3f}" for base in ("_base", "")]
    assert figures["held-out loss"][2:4] == [f"{metrics[f'eval_loss{base}']:.4f}" for base in ("_base", "")]
    assert metrics["eval_loss_low"] < metrics["eval_loss"] < metrics["eval_loss_high"]
    assert "always 好" in tables(run)[0][0]


def test_the_verdict_is_printed_and_stored(run):
    judged = rules.verdict(run.after, run.before, ["train longer", "start from TEXT", "take a larger base"])
    assert run.verdict == judged
    results = json.loads(Path("run/all_results.json").read_text(encoding="utf-8"))
    facts = json.loads(Path("run/report.json").read_text(encoding="utf-8"))
    assert results == run.metrics
    for found in (results, facts["end"]):
        assert (found["verdict"], found["verdict_better"]) == (judged.sentence, judged.better)
    assert judged.sentence in summary(run) and judged.sentence in Path("run/README.md").read_text(encoding="utf-8")


def test_a_prompt_that_starts_from_a_text_is_not_advised_to(settings):
    given = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "好坏", "num_virtual_tokens": 3}
    run = softprompt.train(**settings, **given, learning_rate=1e-9)  # not better than the text that it starts from
    assert not run.verdict.better
    assert "train longer" in run.verdict.sentence and "TEXT" not in run.verdict.sentence


def test_the_confusion_matrix(run):
    facts = json.loads(Path("run/report.json").read_text(encoding="utf-8"))["end"]["confusion"]
    assert set(facts["labels"]) == set(LABELS)
    expected, predicted = run.after.classification.expected, run.after.classification.predicted
    for a, counts in zip(facts["labels"], facts["prompt"], strict=True):
        for b, count in zip(facts["labels"], counts, strict=True):
            assert count == sum(pair == (a, b) for pair in zip(expected, predicted, strict=True))
    assert sum(map(sum, facts["base"])) == 24
    (printed,) = [part for part in tables(run) if "expected \\ predicted" in "".join(part)]
    found = {line.split()[0]: list(map(int, line.split()[1:])) for line in printed[2:]}
    assert found == dict(zip(facts["labels"], facts["prompt"], strict=True))


def rows_in(run) -> list[list[str]]:
    """The cells of the table of held-out rows."""
    (table,) = [part for part in tables(run) if part[0].startswith("held-out row")]
    head, rule, *lines = table
    assert head.split("  ")[0] == "held-out row" and "expected" in head and set(rule) <= {"─", " "}
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]


def test_each_label_and_an_error_are_among_the_rows(run):
    rows = rows_in(run)
    assert {row[1] for row in rows} == set(LABELS)
    assert {row[3][0] for row in rows} == {"✓", "✗"}
    assert all((row[1] == row[3][2:]) == row[3].startswith("✓") for row in rows)
    assert all(row[2] == ("✓ 坏" if row[1] == "坏" else "✗ 坏") for row in rows)


@pytest.mark.parametrize("columns", [40, 100])
def test_tables_fit_the_terminal(columns, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    long = [text * 40 for text in run.after.answers]
    object.__setattr__(run.after, "answers", long)
    for part in tables(run):
        if part[0].startswith("held-out row"):
            assert max(map(display_width, part)) <= columns and "…" in part[2]


def test_wrong_answers_are_listed_the_largest_loss_first(run):
    end = json.loads(Path("run/report.json").read_text(encoding="utf-8"))["end"]
    wrong, losses = end["wrong"], [row["loss"] for row in end["wrong"]]
    assert len(wrong) == 5 and losses == sorted(losses, reverse=True)
    assert all(row["after"] != row["expected"] and row["before"] == "坏" for row in wrong)
    held_out = [f"Human: {row['instruction']}\n\nAssistant:" for row in ROWS[-24:]]
    for row in wrong:
        at = held_out.index(row["question"])
        assert row["loss"] == pytest.approx(run.after.row_losses[at] / run.after.row_targets[at])
        assert row["expected"] == ROWS[-24:][at]["output"]
    for row in end["examples"]["rows"]:
        for name in ("before", "after"):
            assert row[f"correct_{name}"] == (row[name] == row["expected"])


def test_a_base_that_generates_nothing_is_judged_by_its_labels(settings):
    """With --stream_base, no answers are generated."""
    run = softprompt.train(**settings, stream_base=True, engine="packed")
    assert run.after.answers is None and "eval_exact_match" not in run.metrics
    assert run.metrics["eval_accuracy"] == sum(run.after.classification.correct) / 24
    assert "expected \\ predicted" in summary(run) and run.verdict.sentence in summary(run)


def test_free_text_has_a_loss_with_an_interval_and_no_labels(settings, tmp_path):
    rows = [{"instruction": f"第{n}", "output": f"好{n}"} for n in range(32)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = softprompt.train(**settings)
    assert not any(word in name for name in run.metrics for word in ("accuracy", "f1", "majority"))
    assert "always" not in summary(run) and "expected \\ predicted" not in summary(run)
    low, high = run.metrics["eval_loss_low"], run.metrics["eval_loss_high"]
    assert f"{low:.4f}–{high:.4f}" in summary(run) and run.verdict.sentence in summary(run)
    assert "confusion" not in json.loads(Path("run/report.json").read_text(encoding="utf-8"))["end"]


def test_what_all_questions_begin_with_is_left_out_of_the_table(settings):
    """Such as a chat template's system message."""
    run = softprompt.train(**settings, template="You are a helpful assistant. Answer: {instruction}\n")
    told = summary(run)
    assert "…第" in told and "helpful" not in told
