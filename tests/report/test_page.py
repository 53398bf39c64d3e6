"""What the page of a run shows, from made-up contents of report.json."""

import base64
import hashlib
import re
from pathlib import Path

import pytest
from helpers.reported_runs import EVIL, Seen, described_run

from softprompt.report.page import FOLDED_WIDTH, RELOAD_SECONDS, page
from softprompt.report.results import status
from softprompt.runs.run_reader import RunRecord

LABELS = {"labels": ["正面", "负面"], "prompt": [[30, 5], [7, 40]], "base": [[35, 0], [46, 1]]}
WRONG = [
    {"question": f"review {n}", "expected": "负面", "before": "正面", "after": "正面", "loss": loss}
    for n, loss in enumerate([0.5, 4.125, 2.0])
]
ANSWERS = {"of": "held-out", "compared": True}


def test_what_a_run_does_not_say_is_not_shown():
    told = Seen(page([described_run()]))
    assert not told.of("verdict") and not told.of("confusion") and not told.of("answers") and not told.of("words")
    assert "Wrong answers" not in told.text and "Confusion" not in told.text


@pytest.mark.parametrize("better, mark", [(True, "✓"), (False, "✗")])
def test_the_verdict_is_marked(better, mark):
    told = Seen(page([described_run(verdict="not better than always answering 正面", verdict_better=better)]))
    assert f"{mark} not better than always answering 正面" in " ".join(told.text.split())
    assert told.of("verdict")[0]["class"] == f"verdict {'good' if better else 'bad'}"


def test_accuracy_is_shown_with_its_interval_and_the_commonest_label():
    run = described_run()
    run.results.update(eval_accuracy=0.61, eval_accuracy_base=0.55, eval_accuracy_low=0.51, eval_accuracy_high=0.7)
    run.results.update(eval_majority=0.63, eval_macro_f1=0.512, eval_loss_low=0.7, eval_loss_high=0.8)
    told = Seen(page([run])).text.replace("\N{WORD JOINER}", "")
    for text in ("61.0%", "base alone 55.0%", "interval 51.0%–70.0%", "most common label 63.0%", "0.512"):
        assert text in told
    assert "interval 0.7000–0.8000" in told


def test_the_confusion_table_counts_expected_by_predicted():
    html = page([described_run(confusion=LABELS)])
    first, second = re.findall(r'<table class="confusion">.*?</table>', html, re.S)
    cells = re.findall(r'<td class="number (hit|miss)"[^>]*>(.*?)</td>', first)
    shown = [(kind, int(re.search(r"(\d+) <small>", text)[1]), "✓" in text) for kind, text in cells]
    assert shown == [("hit", 30, True), ("miss", 5, False), ("miss", 7, False), ("hit", 40, True)]
    assert "with the prompt" in first and "base alone" in second and "负面" in second


def test_wrong_answers_are_listed_by_their_loss():
    told = Seen(page([described_run(wrong=WRONG)])).text
    assert "3 held-out rows that are answered wrongly" in told
    assert told.index("review 1") < told.index("review 2") < told.index("review 0") and "4.125" in told
    assert "most likely label is right" not in told
    assert "most likely label is right" in Seen(page([described_run(wrong=WRONG, confusion=LABELS)])).text


def test_many_wrong_answers_are_folded_and_the_most_are_left_out():
    many = [{**WRONG[0], "question": f"row number {n}!", "loss": n / 10} for n in range(500)]
    html = page([described_run(wrong=many)])
    assert "200 of 500 held-out rows" in html
    assert html.index("row number 490!") < html.index("190 more</summary>") < html.index("row number 489!")
    assert "row number 299!" not in html


def test_answers_are_marked_as_right_or_wrong():
    rows = [
        {"question": "a", "expected": "好", "before": "x", "after": "好"},
        {"question": "b", "expected": "坏", "before": "坏", "after": "y", "correct_before": False},
    ]
    html = page([described_run(examples={**ANSWERS, "rows": rows})])
    cells = re.findall(r'<td class="text ?(\w*)" data-label="(base alone|with the prompt)">(.*?)</td>', html, re.S)
    assert [kind for kind, _, _ in cells] == ["wrong", "right", "wrong", "wrong"]
    assert all(("✓" in text) == (kind == "right") and ("✗" in text) == (kind == "wrong") for kind, _, text in cells)
    html = page([described_run(examples={**ANSWERS, "compared": False, "new_tokens": 64, "rows": rows[:1]})])
    assert "✓" not in html and "✗" not in html  # free text is neither


def test_a_long_text_is_folded():
    text = "word " * 100
    rows = [{"question": "short", "expected": text, "before": "x", "after": "x"}]
    html = page([described_run(examples={**ANSWERS, "rows": rows})])
    start, whole = re.search(
        r'<details class="long"><summary><bdi>(.*?)</bdi></summary><bdi>(.*?)</bdi>', html
    ).groups()
    assert whole == text and text.startswith(start[:-1]) and len(start) <= FOLDED_WIDTH + 1
    assert html.count('class="long"') == 1


@pytest.mark.parametrize("text", ["没有空格的很长的一句话。" * 10, "a\nb\nc\nd\ne\nf\ng"])
def test_wide_and_many_lines_are_folded_too(text):
    rows = [{"question": "short", "expected": text, "before": "x", "after": "x"}]
    html = page([described_run(examples={**ANSWERS, "rows": rows})])
    start, whole = re.search(
        r'<details class="long"><summary><bdi>(.*?)</bdi></summary><bdi>(.*?)</bdi>', html, re.S
    ).groups()
    assert whole == text and text.startswith(start[:-1]) and start.endswith("…")


def test_words_below_the_null_level_are_dim():
    tokens = [{"nearest": [("near", 0.9), ("far", 0.25)]}, {"nearest": [("noise", 0.3), ("more", 0.1)]}]
    likeness = {"P": 2, "layernorm": False, "chance": 0.3, "tokens": tokens, "similarities": [[1, 0], [0, 1]]}
    html = page([described_run(likeness=likeness)])
    shown = re.findall(r'<span( class="dim")?><bdi>(\w+)</bdi>', html)
    assert [word for dim, word in shown if dim] == ["far", "noise", "more"] and ("", "near") in shown


def test_one_held_out_figure_is_a_number():
    once = [record for record in described_run().history if record.get("eval_loss") != 1.25]
    charts = [a["aria-label"] for a in Seen(page([described_run(history=once)])).of("svg")]
    html = page([described_run(history=once)])
    assert any(label.startswith("Loss") for label in charts) and "0.7500" in html
    assert "held out</bdi>" not in html and "base alone (3.2500)" not in html
    assert "held out</bdi>" in page([described_run()]) and "base alone (3.2500)" in page([described_run()])
    only = [{"step": 20, "eval_loss": 0.75}]
    assert "svg" not in {
        label for label, _ in Seen(page([described_run(history=only)])).elements if label == "polyline"
    }
    assert not Seen(page([described_run(history=only)])).of("line")


def test_a_limit_far_beyond_all_rows_is_no_line():
    run = described_run()
    assert "longer than every row" in page([run])
    run.facts["arguments"]["max_length"] = 20
    assert "longer than every row" not in page([run]) and "--max_length 20" in page([run])


def test_the_only_script_is_the_one_that_the_policy_names():
    rows = [{"question": EVIL, "expected": EVIL, "before": EVIL, "after": EVIL}]
    run = described_run(examples={**ANSWERS, "rows": rows}, wrong=[{**rows[0], "loss": 1.0}], verdict=EVIL)
    told = Seen(page([run]))
    (script,) = told.scripts
    policy = next(a["content"] for a in told.of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    hashed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'") and f"script-src 'sha256-{hashed}'" in policy
    assert told.text.count("<script>alert(1)</script>") >= 5


def test_only_a_live_page_loads_itself_again():
    def reloads(**how):
        return [
            a["content"] for a in Seen(page([described_run()], **how)).of("meta") if a.get("http-equiv") == "refresh"
        ]

    assert reloads() == [] and reloads(live=True) == [str(RELOAD_SECONDS)]


def test_a_run_that_goes_on_shows_its_progress():
    run = described_run()
    del run.facts["end"]
    html = page([RunRecord(run.folder, run.facts, run.history[:1], runs_now=True)])
    assert '<progress value="10" max="20">' in html and "running now: its metrics end at step 10 of 20" in html
    assert "no step is logged yet" in page([RunRecord(run.folder, run.facts, [], runs_now=True)])
    assert "<progress" not in page([described_run()])


def test_every_section_can_be_reached_and_folded():
    likeness = {"P": 1, "layernorm": False, "chance": 0.3, "tokens": [{"nearest": [("a", 0.9)]}], "similarities": [[1]]}
    rows = [{"question": "q", "expected": "a", "before": "b", "after": "a"}]
    examples = {**ANSWERS, "rows": rows}
    told = Seen(page([described_run(examples=examples, confusion=LABELS, wrong=WRONG, likeness=likeness)]))
    targets = {a["id"] for a in told.of("anchor")}
    assert len(targets) == 7 and {a["href"].removeprefix("#") for a in told.of("a")} == targets
    assert len(told.of("fold")) == 8  # one holds the charts that few need
    assert all("open" in a for a in told.of("fold"))  # so that all can be read without the script


@pytest.mark.parametrize(
    "why, words", [(None, None), ("no_more_rows", "fewer rows"), ("early_stopping", "no longer improved")]
)
def test_why_a_run_ended_before_its_last_step(why, words):
    facts = {"prompt": [1, 8], "end": {}, "total_steps": 10, "ended_early": why}
    early = status(RunRecord(Path("run"), facts, [{"step": 8}]))
    assert early.startswith("ended early at step 8 of 10") and ("because" in early) == (why is not None)
    assert words is None or words in early
    assert status(RunRecord(Path("run"), facts, [{"step": 10}])) == "finished after step 10 of 10"
