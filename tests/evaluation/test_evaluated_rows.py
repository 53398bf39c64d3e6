"""Which rows a metric covers: those with whole answers, read and truncated as in the adapter's training."""

import json
from pathlib import Path

import pytest
from helpers.adapters import write_adapter
from helpers.programs import refusal, run_infer

import infer
import softprompt
from softprompt.data.template import Template
from softprompt.data.tokenization import tokenize
from softprompt.generation.adapters import LoadedAdapter
from softprompt.models.loading import load_tokenizer
from softprompt.study.page import result_table
from softprompt.training.summary import summary
from softprompt.utils.errors import AdapterError, ConfigError
from softprompt.utils.translation import VARIABLE


def written(path: str, rows: list[dict]) -> str:
    Path(path).write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def row(question: int, answer: int, label: str = "b") -> dict:
    """A row with a question and an answer of that many letters, each of which is a token."""
    return {"instruction": "a" * question, "output": label * answer}


@pytest.fixture
def settings(tiny_base, tmp_path, monkeypatch) -> dict:
    """Settings of a short run with held-out rows in rows.jsonl."""
    monkeypatch.chdir(tmp_path)
    written("train.jsonl", [row(3, 2)] * 4)
    flags = {"dataset": "train.jsonl", "eval_dataset": "rows.jsonl", "max_steps": 2, "gradient_accumulation_steps": 1}
    return {"model_name_or_path": str(tiny_base), "output_dir": "run", "num_virtual_tokens": 3, **flags}


def kept_whole(rows: list[dict], base: str, max_length: int) -> tuple[int, int]:
    """How many rows keep a target, and how many of these keep their whole answer, by a naive count of tokens."""
    tokenizer, kept, whole = load_tokenizer(base), 0, 0
    for one in rows:
        asked = len(tokenizer(f"Human: {one['instruction']}\n\nAssistant: ")["input_ids"])
        answer = len(tokenizer(one["output"] + tokenizer.eos_token)["input_ids"])
        kept, whole = kept + (asked < max_length), whole + (asked + answer <= max_length)
    return kept, whole


def test_a_run_says_which_held_out_rows_were_trained_on(settings, capsys, monkeypatch):
    """Of 4 such rows, one has no target and is not evaluated."""
    written("train.jsonl", [*(row(n, 2) for n in (3, 4, 5)), row(60, 2)])
    written("rows.jsonl", [row(60, 2), *(row(n, 2, "ab"[n % 2]) for n in range(3, 30)), row(5, 2), row(8, 2, "c")])
    run = softprompt.train(**settings, max_length=50)
    told = "Without the 3 of 29 held-out rows"
    assert "4 of 30 held-out rows" in capsys.readouterr().out and run.metrics["eval_samples"] == 29
    results = json.loads((run.output_dir / "all_results.json").read_text())
    assert told in run.verdict.sentence and results["verdict"] == run.verdict.sentence
    for shown in (summary(run), run._repr_html_(), *(Path("run", f).read_text() for f in ("report.html", "README.md"))):
        assert told in shown
    monkeypatch.setenv(VARIABLE, "zh")
    assert "不计与训练样本相同的" in summary(run)


def test_exact_match_covers_rows_with_whole_answers(settings, capsys, monkeypatch):
    rows = [row(n, 9) for n in (3, 10, 20, 38, 42, 60)]
    written("rows.jsonl", rows)
    kept, whole = kept_whole(rows, settings["model_name_or_path"], 50)
    assert 0 < whole < kept < len(rows)
    run = softprompt.train(**settings, max_length=50)
    said = capsys.readouterr().out
    assert f"over the {whole} of {kept} rows" in said and f"Held out: {kept} of {len(rows)} rows" in said
    assert f"Evaluated on {kept} of {len(rows)} rows" in summary(run) and run.metrics["eval_samples"] == kept
    for suffix in ("", "_base"):
        assert run.metrics[f"eval_exact_match_rows{suffix}"] == whole
    assert len(run.after.answers) == kept and run.after.compared == whole
    assert f"exact match of {whole} rows" in summary(run)
    results = json.loads(Path("run/all_results.json").read_text())
    card = Path("run/README.md").read_text(encoding="utf-8")
    (of_card,) = [line for line in card.splitlines() if line.startswith("| rows compared for exact match")]
    assert results["eval_exact_match_rows"] == whole and of_card.endswith(f" | {whole} | {whole} |")
    out = run_infer(["--adapter", "run", "--eval_dataset", "rows.jsonl"], capsys, monkeypatch)
    assert f"over the {whole} of {kept} rows" in out and f"{kept} of {len(rows)} rows" in out
    (line,) = [line for line in out.splitlines() if line.startswith("exact match  ")]
    assert line.split()[-1] == f"{run.metrics['eval_exact_match']:.1%}"


@pytest.mark.parametrize("answer", [20, 100])
def test_no_exact_match_if_no_answer_is_whole(answer, settings, capsys):
    """However short the rest of an answer is; a metric that is missing cannot select the best prompt."""
    written("rows.jsonl", [row(9, answer)] * 3)
    tokens = kept_whole([row(9, answer)], settings["model_name_or_path"], 30)
    assert tokens == (1, 0)
    run = softprompt.train(**settings, max_length=30)
    said = capsys.readouterr().out
    assert said.count("no exact match") == 1 and run.after.answers is None
    assert ("a larger --max_length" in said) == (answer <= 31)  # longer ones are not compared anyway
    assert not any("exact_match" in name for name in run.metrics)
    assert "exact match" not in summary(run)
    chosen = {
        "metric_for_best_model": "exact_match",
        "early_stopping_patience": 1,
        "output_dir": "other",
        "eval_steps": 1,
    }
    with pytest.raises(ConfigError, match="metric_for_best_model"):
        softprompt.train(**{**settings, **chosen, "output_dir": "other"}, max_length=30)
    assert not Path("other").exists()


def test_tokenize_counts_the_truncated_tokens_of_answers(tokenizer):
    rows = [row(5, 10), row(30, 10), row(34, 10), row(99, 10)]
    whole = tokenize(rows, tokenizer, Template(), 1000)
    assert list(whole.kept) == [0, 1, 2, 3] and list(whole.missing) == [0, 0, 0, 0]
    for max_length in (30, 47, 52, 56):
        for side in ("output", "input"):
            found = tokenize(rows, tokenizer, Template(), max_length, side)
            assert len(found.kept) == len(found.missing) == len(found.examples)
            for number, missing, example in zip(found.kept, found.missing, found.examples, strict=True):
                targets = [label for label in whole.examples[number].labels if label != -100]
                left = [label for label in example.labels if label != -100]
                assert left == targets[: len(targets) - missing]


def test_train_and_infer_evaluate_a_prompt_alike(settings, capsys, monkeypatch):
    """The adapter folder holds the run's max_length, truncation_side and columns. Some rows are longer than max_length,
    and the answers are labels."""
    rows = [row(n, 2, label) for n, label in zip((3, 30, 90, 4, 120), "bcbcc", strict=True)]
    theirs = [{"text": one["instruction"], "label": one["output"]} for one in rows]
    written("rows.jsonl", theirs)
    written("train.jsonl", theirs)
    cut = {"max_length": 60, "truncation_side": "input", "columns": "instruction=text,output=label"}
    run = softprompt.train(**settings, **cut)
    beside = json.loads(Path("run/softprompt.json").read_text())
    assert beside["max_length"] == 60 and beside["truncation_side"] == "input"
    assert beside["columns"] == {"instruction": "text", "output": "label"}

    def evaluated(*flags) -> dict[str, str]:
        out = run_infer(["--adapter", "run", "--eval_dataset", *flags], capsys, monkeypatch)
        return {" ".join(line.split()[:-1]): line.split()[-1] for line in out.splitlines() if line.strip()}, out

    figures, out = evaluated("rows.jsonl")
    assert figures["loss"] == f"{run.metrics['eval_loss']:.4f}" and "2 rows cut" in out
    assert figures["exact match"] == f"{run.metrics['eval_exact_match']:.1%}"
    assert figures["accuracy (most likely label)"] == f"{run.metrics['eval_accuracy']:.1%}"
    assert figures["macro F1"] == f"{run.metrics['eval_macro_f1']:.3f}"
    ends = [run.metrics[f"eval_accuracy_{end}"] for end in ("low", "high")]
    assert figures["accuracy, 95 % interval"] == f"{100 * ends[0]:.1f}–{ends[1]:.1%}"
    assert f"{run.metrics['eval_majority']:.1%}" == "60.0%" and "always answering cc has an accuracy of 60.0%" in out
    bare, _ = evaluated("rows.jsonl", "--adapter", "none")
    assert bare["loss " + figures["loss"]] == f"{run.metrics['eval_loss_base']:.4f}"
    assert bare[f"accuracy (most likely label) {figures['accuracy (most likely label)']}"] == (
        f"{run.metrics['eval_accuracy_base']:.1%}"
    )
    written("ours.jsonl", rows)  # the run's columns do not apply to a dataset that has others
    assert evaluated("ours.jsonl")[0]["loss"] == figures["loss"]
    both = [{**mine, "text": "zzz", "label": "z"} for mine in rows]
    given = evaluated(written("both.jsonl", both), "--columns", "instruction=instruction,output=output")
    assert given[0]["loss"] == figures["loss"]
    mixed = [{"instruction": "y", "text": one["text"], "answer": one["label"]} for one in theirs]
    assert evaluated(written("mixed.jsonl", mixed), "--columns", "output=answer")[0]["loss"] == figures["loss"]
    argv = ["--adapter", "run", "--eval_dataset", "mixed.jsonl", "--columns", "output=nothing"]
    assert "maps output to 'nothing'" in refusal(infer, argv, capsys, monkeypatch)
    cut_off, out = evaluated("rows.jsonl", "--truncation_side", "output")
    assert cut_off["loss"] != figures["loss"] and "3 of 5 rows" in out
    assert "--truncation_side: trained with input, evaluated with output" in out
    assert "4 of 5 rows" in evaluated("rows.jsonl", "--truncation_side", "output", "--max_length", "110")[1]


def beside(folder: str, **settings) -> None:
    path = Path(folder) / "softprompt.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def test_adapters_trained_with_other_lengths_are_evaluated_on_the_same_rows(place, tiny_base, capsys, monkeypatch):
    write_adapter(place / "c", tiny_base, 4, seed=3)
    beside("a", max_length=40, truncation_side="output")
    beside("c", max_length=300, truncation_side="input")
    written("rows.jsonl", [row(n, 2, label) for n, label in ((3, "b"), (60, "c"), (90, "b"))])
    argv = ["--adapter", "a", "--adapter", "c", "--adapter", "none", "--eval_dataset", "rows.jsonl"]
    out = run_infer(argv, capsys, monkeypatch)
    assert "--max_length: trained with 40 and 300, evaluated with 300" in out
    assert "--truncation_side: trained with input and output, evaluated with input" in out
    given = run_infer([*argv, "--max_length", "300", "--truncation_side", "input"], capsys, monkeypatch)
    assert out.splitlines()[:8] == given.splitlines()[:8] and "give --" not in given
    alone = run_infer(["--adapter", "a", "--adapter", "none", "--eval_dataset", "rows.jsonl"], capsys, monkeypatch)
    assert "--max_length 40 --truncation_side output: 1 of 3 rows" in alone and "trained with" not in alone


def test_defaults_apply_to_an_adapter_without_truncation_settings(place, capsys, monkeypatch):
    written("rows.jsonl", [row(3, 2), row(300, 2)])
    out = run_infer(["--adapter", "a", "--eval_dataset", "rows.jsonl"], capsys, monkeypatch)
    assert "--max_length 256 --truncation_side output: 1 of 2 rows" in out
    assert "--max_length: trained with an unknown value, evaluated with 256" in out
    beside("a", max_length=256)  # as an earlier version of this project wrote it
    out = run_infer(["--adapter", "a", "--eval_dataset", "rows.jsonl"], capsys, monkeypatch)
    (told,) = [line for line in out.splitlines() if "unknown" in line]
    assert told.startswith("--truncation_side: ") and "evaluated with output" in told
    asked = ["--adapter", "a", "--eval_dataset", "rows.jsonl", "--max_length", "39", "--truncation_side", "input"]
    out = run_infer(asked, capsys, monkeypatch)
    assert "unknown" not in out and "--max_length: trained with 256, evaluated with 39" in out
    Path("t.txt").write_text("a" * 50)
    beside("a", max_length=7)
    assert "--max_length 7 " in run_infer(["--adapter", "a", "--eval_dataset", "t.txt"], capsys, monkeypatch)


@pytest.mark.parametrize(
    "settings",
    [
        *({"max_length": value} for value in (0, "60", 1.5, True, None)),
        *({"truncation_side": value} for value in ("left", 1, None, ["input"])),
        *({"columns": value} for value in ("a=b", ["a"], {"a": 1}, None, {"a": "\ud800"})),
        *({"load_in_4bit": value} for value in (1, "true", None)),
    ],
)
def test_invalid_settings_in_an_adapter_folder(settings, place):
    beside("a", **settings)
    (name,) = settings
    with pytest.raises(AdapterError, match=f"softprompt.json: {name} must be .*correct it there"):
        LoadedAdapter.from_folder("a")


@pytest.mark.parametrize(
    "flags",
    [
        "--prompt a --columns output=b",
        "--prompt a --truncation_side input",
        "--eval_dataset t.txt --columns output=b",
        "--eval_dataset t.txt --truncation_side input",
        "--eval_dataset rows.jsonl --columns output",
        "--eval_dataset rows.jsonl --truncation_side left",
    ],
)
def test_flags_that_do_not_apply(flags, place, capsys, monkeypatch):
    line = refusal(infer, ["--adapter", "a", *flags.split()], capsys, monkeypatch)
    assert f"--{'columns' if 'columns' in flags else 'truncation_side'}" in line


def test_labels_are_scored_with_the_white_space_of_the_rows(place, capsys, monkeypatch):
    """Training learned them with that white space."""
    rows = [{"instruction": f"第{n}", "output": " 正面" if n % 2 else " 负面"} for n in range(4)]
    written("rows.jsonl", rows)
    model = softprompt.SoftPromptModel.from_pretrained(adapter="a")
    results = model.classify([one["instruction"] for one in rows], [" 负面", " 正面"])
    right = sum(v.label == one["output"] for v, one in zip(results, rows, strict=True))
    for choices in ([], ["--choices", "负面,正面"]):
        out = run_infer(["--adapter", "a", "--eval_dataset", "rows.jsonl", *choices], capsys, monkeypatch)
        assert f"accuracy (most likely label)  {right / 4:.1%}" in out


def test_a_study_says_how_many_rows_exact_match_covers(tmp_path, tiny_base, monkeypatch, capsys):
    from softprompt.study.grid import read_study
    from softprompt.study.results import cell_result
    from softprompt.study.study import run_study

    monkeypatch.chdir(tmp_path)
    rows = [row(n, 9) for n in (3, 3, 3, 3, 10, 40, 60)]
    written("rows.jsonl", rows)
    kept, whole = kept_whole(rows[-3:], str(tiny_base), 50)
    assert (kept, whole) == (2, 1)
    settings = ["dataset = 'rows.jsonl'", "eval_rows = 3", "max_length = 50", "max_steps = 1"]
    settings = [f"model_name_or_path = '{tiny_base}'", *settings]
    lines = ["title = 't'", "seeds = [0]", "[settings]", *settings, "[[grid]]", "num_virtual_tokens = [2, 3]"]
    Path("s.toml").write_text("\n".join(lines))
    run_study(read_study(Path("s.toml")))
    assert "over the 1 of 2 rows" in capsys.readouterr().out
    cells = [json.loads(path.read_text()) for path in Path("runs").rglob("cell.json")]
    results = [cell_result(cell) for cell in cells]
    assert {p.exact_match_rows for p in results} == {1}
    assert all(line[-1].endswith(" of 1 rows") for line in result_table(results)[1:])
