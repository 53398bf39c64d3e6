"""Studies: the results of cells, resuming, and the files that are written."""

import csv
import json
import math
import os
import shutil
import signal
import sys

import pytest
import torch
from helpers.study_files import ROWS, Counted
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, BloomForCausalLM

import softprompt
from softprompt.cli import run_command
from softprompt.cli import study as study_command
from softprompt.data.template import Template
from softprompt.evaluation.intervals import wilson_interval
from softprompt.prompt.adapter_io import load_adapter
from softprompt.study import cell_runner
from softprompt.study import plan as study_plan
from softprompt.study.cell_runner import subset
from softprompt.study.findings import sentences
from softprompt.study.page import result_table
from softprompt.study.plan import plan_study
from softprompt.study.results import cell_result, read_finished
from softprompt.study.study import run_study
from softprompt.utils.errors import ConfigError, DataError, ModelError, OutputError, Stopped
from softprompt.utils.file_lock import FolderLock

GRID = "[[grid]]\nnum_virtual_tokens = [1, 3]\nrows = [4, 'all']"


def test_bases_and_rows_are_loaded_once_and_finished_cells_are_not_run_again(
    place, monkeypatch, capsys, tmp_path, tiny_base
):
    shutil.copytree(tiny_base, tmp_path / "twin")
    study = place(
        "seeds = [0, 1]\nhard_prompts = ['好']",
        GRID + f"\nmodel_name_or_path = {[str(tiny_base), str(tmp_path / 'twin')]}",
    )
    loads, trained = Counted(monkeypatch, cell_runner, "load_base"), Counted(monkeypatch, cell_runner, "train")
    tokenized = Counted(monkeypatch, study_plan, "tokenize_rows")
    run_study(study)
    assert (loads.calls, tokenized.calls, trained.calls) == (2, 1, 16)
    first = capsys.readouterr()
    assert "18 cells, 0 of them already finished" in first.out
    made = sorted((place.folder / "out" / "cells").iterdir())
    assert len(made) == 18
    run_study(study)
    assert (loads.calls, trained.calls) == (2, 16)
    again = capsys.readouterr().out
    assert "18 of them already finished" in again
    assert "held out: 5 rows, " in first.out.split("18 cells")[0]  # what was found in the rows is said
    assert again.split("\n\n", 1)[1] == first.out.split("\n\n", 1)[1]  # the tables


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "cell.json", "checksums.json"])
def test_a_damaged_cell_is_run_again_with_the_same_result(file, place, monkeypatch):
    study = place(grid="[[grid]]\nnum_virtual_tokens = [1, 3]")
    run_study(study)
    one = plan_study(study)[1].folder
    before = (one / "adapter_model.safetensors").read_bytes()
    whole = (one / file).read_bytes()
    (one / file).write_bytes(whole[: len(whole) // 2])
    assert read_finished(one) is None
    trained = Counted(monkeypatch, cell_runner, "train")
    run_study(study)
    assert trained.calls == 1 and read_finished(one)
    assert (one / "adapter_model.safetensors").read_bytes() == before


def test_changed_rows_or_base_files_make_new_cells(place, monkeypatch, tmp_path, tiny_base):
    shutil.copytree(tiny_base, tmp_path / "base")
    study = place(grid=f'[[grid]]\nmodel_name_or_path = "{tmp_path / "base"}"')
    trained = Counted(monkeypatch, cell_runner, "train")
    run_study(study)
    (place.folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS[1:]), encoding="utf-8")
    run_study(study)
    other = BloomForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        other.transformer.h[0].mlp.dense_h_to_4h.weight.mul_(1.5)
    other.save_pretrained(tmp_path / "base")
    run_study(study)
    assert trained.calls == 3


@pytest.mark.parametrize(
    "file, change",
    [("tokenizer_config.json", {"eos_token": "<s>"}), ("config.json", {"layer_norm_epsilon": 0.1})],
)
def test_bases_that_differ_in_a_configuration_file_share_no_examples_and_no_cells(
    file, change, place, tmp_path, tiny_base
):
    """Base and instruct models of one family share tokenizer.json and differ in the end token."""
    shutil.copytree(tiny_base, tmp_path / "other")
    path = tmp_path / "other" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    grid = f"""[[grid]]\nmodel_name_or_path = ["{tiny_base}", "{tmp_path / "other"}"]"""
    plan = plan_study(place(grid=grid))
    ends = [{e.input_ids[-1] for e in (*one.inputs.train.examples, *one.inputs.held_out.examples)} for one in plan]
    assert ends == [{2}, {1 if "eos_token" in change else 2}]
    path.write_text((tiny_base / file).read_text())
    (before, after) = (one.folder.name.rsplit("-", 1)[1] for one in (plan[1], plan_study(place(grid=grid))[1]))
    assert before != after


@pytest.mark.parametrize("init", ["RANDOM", "SAMPLE_VOCAB"])
def test_a_cell_equals_a_run_of_train_py(init, place, tmp_path, tiny_base):
    grid = "[[grid]]\nnum_virtual_tokens = 3\nengine = 'packed'\neval_rows = 6\n"  # auto depends on time
    grid += f"prompt_tuning_init = '{init}'"
    run_study(place(grid=grid))
    (folder,) = (place.folder / "out" / "cells").iterdir()
    run = softprompt.train(
        engine="packed",
        model_name_or_path=str(tiny_base),
        dataset=str(tmp_path / "rows.jsonl"),
        eval_rows=6,
        max_steps=2,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=1,
        num_virtual_tokens=3,
        prompt_tuning_init=init,
        output_dir=str(tmp_path / "run"),
    )
    assert torch.equal(load_adapter(folder).prompt, load_adapter(run.output_dir).prompt)
    metrics = read_finished(folder)["metrics"]
    for name in ("eval_loss", "eval_loss_base", "eval_exact_match", "eval_accuracy", "eval_accuracy_base"):
        assert metrics[name] == run.metrics[name]
    for name in ("eval_accuracy_low", "eval_accuracy_high", "eval_majority"):
        assert metrics[name] == run.metrics[name]
    ends = metrics["eval_accuracy_low_base"], metrics["eval_accuracy_high_base"]
    assert ends == wilson_interval(round(6 * metrics["eval_accuracy_base"]), 6)
    result, wanted = cell_result(read_finished(folder)), metrics["eval_accuracy"]
    assert result.learning_rate == result.default_learning_rate == run.config.training.learning_rate
    assert (result.accuracy, result.majority) == (wanted, 2 / 6)
    (head, before, after) = result_table([result])
    at = head.index("accuracy")
    assert before[at].endswith("; most common label 33.3%") and after[at].startswith(f"{wanted:.1%} (")
    with open(place.folder / "out" / "study.csv", encoding="utf-8", newline="") as file:
        (line,) = csv.DictReader(file)
    assert float(line["accuracy"]) == wanted and float(line["accuracy_high"]) == metrics["eval_accuracy_high"]


def test_answers_that_are_no_labels_have_no_accuracy(place):
    run_study(place(grid="[[grid]]\nnum_virtual_tokens = 1"))  # 5 held-out rows with 3 different answers
    (folder,) = (place.folder / "out" / "cells").iterdir()
    result = cell_result(read_finished(folder))
    assert result.accuracy is result.base_accuracy is result.majority is None
    assert "accuracy" not in result_table([result])[0]


def test_a_hard_prompt_equals_its_text_before_the_input(place, tiny_base):
    run_study(place("hard_prompts = ['这家好']", "[[grid]]\nnum_virtual_tokens = 1"))
    (hard,) = [
        r for f in (place.folder / "out" / "cells").iterdir() if not (r := read_finished(f))["settings"]["trained"]
    ]
    tokenizer, base = AutoTokenizer.from_pretrained(tiny_base), BloomForCausalLM.from_pretrained(tiny_base).eval()
    total, targets = 0.0, 0
    for row in ROWS[-5:]:
        asked = tokenizer("这家好")["input_ids"] + tokenizer(Template().render(row, tokenizer))["input_ids"]
        answer = tokenizer(row["output"])["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            scores = base(torch.tensor([asked + answer])).logits[0].log_softmax(-1)
        total -= sum(scores[len(asked) + i - 1, token].item() for i, token in enumerate(answer))
        targets += len(answer)
    assert hard["metrics"]["eval_loss"] == pytest.approx(total / targets, abs=1e-5)
    assert hard["steps"] == 0


@pytest.mark.parametrize("voting", ["majority_vote", "mean_likelihood"])
def test_an_ensemble_equals_the_votes_of_its_members(voting, place, tmp_path, tiny_base):
    """The loss is that of the mean of their likelihoods, and the answers are those of infer.py."""
    grid = "[[grid]]\nnum_virtual_tokens = 3\nlearning_rate = 1.0"
    run_study(place(f"seeds = [0, 1, 2]\nvoting = ['{voting}']", grid))
    found = {f: read_finished(f) for f in (place.folder / "out" / "cells").iterdir()}
    (together,) = [r for r in found.values() if r["settings"].get("voting")]
    folders = [f for f, r in found.items() if r["settings"]["trained"]]
    model = softprompt.SoftPromptModel.from_pretrained(adapter=[str(f) for f in folders])
    given = list(zip(*(found[f]["answers"] for f in folders), strict=True))
    assert any(len(set(some)) == 3 for some in given[1:])
    rows = [{"prompt": row["instruction"], "input": ""} for row in ROWS[-5:]]
    ensemble = model.ensemble(voting=voting)
    answers = ensemble.generate(rows, do_sample=False, max_new_tokens=32)
    assert together["answers"] == [answer.strip() for answer in answers]
    total = 0.0
    for row, asked in zip(ROWS[-5:], rows, strict=True):
        (each,) = zip(*model.log_likelihoods([asked] * 3, [row["output"]], adapter=list(model.adapters)), strict=True)
        total -= math.log(sum(map(math.exp, each)) / 3)
    assert together["metrics"]["eval_loss"] == pytest.approx(total / together["held_out_targets"], abs=1e-5)
    right = sum(a == row["output"] for a, row in zip(together["answers"], ROWS[-5:], strict=True))
    assert together["metrics"]["eval_exact_match"] == right / 5 and together["steps"] == 0


def test_cells_that_mean_the_same_run_are_planned_once(place, tiny_base):
    head, text = (
        "seeds = [0, 1]\nvoting = ['majority_vote']",
        "prompt_tuning_init = 'TEXT'\nprompt_tuning_init_text = '好'",
    )
    length = len(AutoTokenizer.from_pretrained(tiny_base)("好")["input_ids"])
    grids = ["rows = ['all', 13, 4]", "num_virtual_tokens = 10", text, f"{text}\nnum_virtual_tokens = {length}"]
    every = plan_study(place(head, "\n[[grid]]\n".join(["", *grids])))
    some = plan_study(place(head, "\n[[grid]]\n".join(["", "rows = ['all', 4]", text])))
    assert [one.folder for one in every] == [one.folder for one in some] and len(some) == 9


def test_an_encoder_of_the_default_width_is_planned_once(place, tiny_base):
    width = AutoConfig.from_pretrained(tiny_base).hidden_size
    grid = "[[grid]]\nprompt_reparameterization = ['none', 'mlp']"
    plan = plan_study(place(grid=f"{grid}\n{grid}\nencoder_hidden_size = [{width}, {width + 1}]"))
    widths = [one.cell.config.prompt.encoder_hidden_size for one in plan]
    assert widths == [None, None, width + 1]


def test_an_ensemble_with_a_member_that_is_not_finite(place, capsys):
    head = "seeds = [0, 1]\nvoting = ['majority_vote']"
    run_study(place(head, "[[grid]]\nlearning_rate = 1e38", more=["max_grad_norm = 0.0"]))
    assert "a member of the ensemble became infinite or NaN" in capsys.readouterr().err


def test_subsets_depend_on_the_seed_and_are_nested():
    rows = list(range(50))
    assert set(subset(rows, 4, 0)) < set(subset(rows, 9, 0)) and subset(rows, None, 0) == rows
    assert set(subset(rows, 9, 0)) != set(subset(rows, 9, 1)) and len(set(subset(rows, 9, 0))) == 9


def test_a_cell_trains_on_its_subset(place, monkeypatch):
    study, seen, real = place("seeds = [0, 1]", "[[grid]]\nrows = [4, 'all']"), [], cell_runner.train

    def train(engine, prompt, feed, *args):
        seen.append(feed.examples)
        return real(engine, prompt, feed, *args)

    monkeypatch.setattr(cell_runner, "train", train)
    run_study(study)
    every = plan_study(study)[0].inputs.train.examples
    assert seen == [subset(every, 4, 0), subset(every, 4, 1), every, every]


def test_a_stopped_study_continues_with_the_remaining_cells(place, monkeypatch):
    study = place("seeds = [0, 1, 2]", "[[grid]]\nnum_virtual_tokens = 2")
    real, calls = cell_runner.train, []

    def train(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **kwargs)

    monkeypatch.setattr(cell_runner, "train", train)
    with pytest.raises(Stopped, match="run the same command to continue") as stopped:
        run_study(study)
    assert stopped.value.exit_code == 130
    assert sum(bool(read_finished(one.folder)) for one in plan_study(study)) == 1
    run_study(study)
    assert len(calls) == 4 and all(read_finished(one.folder) for one in plan_study(study))


@pytest.mark.pictures
def test_page_table_and_charts(place, capsys):
    head = """title = 'Of hm'\nabout = 'More.'\nseeds = [0, 1]\nhard_prompts = ["好|坏\\n"]"""
    study = place(head, GRID + "\nlearning_rate = [0.01, 0.1]")
    found = run_study(study)
    out = place.folder / "out"
    printed = capsys.readouterr().out
    page = (out / "study.md").read_text(encoding="utf-8")
    for sentence in sentences(found):
        assert sentence in page and sentence in printed
    pictures = {"study-virtual_tokens.svg", "study-learning_rate.svg", "study-rows.svg"}
    assert {p.name for p in out.glob("*.svg")} == pictures
    for name in pictures:
        assert f"({name})" in page and b"<svg" in (out / name).read_bytes()
    assert "好\\|坏\\n" in page and page.startswith("# Of hm\n\nMore.\n\n`python -m softprompt study")
    with open(out / "study.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 17
    four = [
        float(r["loss"]) for r in lines if (r["virtual_tokens"], r["rows"], r["learning_rate"]) == ("3", "4", "0.1")
    ]
    mean, spread = sum(four) / 2, abs(four[0] - four[1]) / 2**0.5
    assert f"| SAMPLE_VOCAB |  | 3 | 0.1 | 4 | 2 | {mean:.4f} ± {spread:.4f} |" in page
    assert "no prompt" in printed


def test_without_matplotlib_there_are_no_charts(place, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run_study(place(grid="[[grid]]\nnum_virtual_tokens = [1, 3]"))
    assert "matplotlib is not installed; pip install" in capsys.readouterr().out
    assert not list((place.folder / "out").glob("*.svg")) and (place.folder / "out" / "study.md").exists()


def test_training_that_diverges_is_a_result(place, capsys):
    run_study(place(grid="[[grid]]\nlearning_rate = [0.01, 1e38]\neval_rows = 6", more=["max_grad_norm = 0.0"]))
    assert "not finite" in capsys.readouterr().out
    results = [cell_result(read_finished(f)) for f in (place.folder / "out" / "cells").iterdir()]
    (diverged,) = [r for r in results if math.isinf(r.loss)]
    assert diverged.accuracy is None and diverged.base_accuracy is not None and diverged.majority == 2 / 6


@pytest.mark.parametrize(
    "grid, error, message",
    [
        ("[[grid]]\nrows = [4, 99]", ConfigError, "rows 99 seed 42: rows 99 is more than the 13 rows of"),
        ("[[grid]]\ndevice = ['cpu', 'cuda:97']", ConfigError, "the cell .*--device cuda:97"),
        ("[[grid]]\neval_rows = 0", ConfigError, "no held-out rows .*eval_rows"),
        ("[[grid]]\nmodel_name_or_path = ['./nowhere']", ModelError, r"s\.toml: the cell .*: no such folder .*; give"),
        ("[[grid]]\ndataset = 'nothing.jsonl'", DataError, r"s\.toml: the cell .* nothing\.jsonl: no such file; name"),
    ],
)
def test_impossible_cells_are_refused_before_the_first_one_runs(grid, error, message, place, monkeypatch):
    trained = Counted(monkeypatch, cell_runner, "train")
    with pytest.raises(error, match=message):
        run_study(place(grid="[[grid]]\nnum_virtual_tokens = 1\n" + grid))
    assert trained.calls == 0 and not (place.folder / "out").exists()


def test_a_base_without_weights(place, tmp_path, tiny_base):
    shutil.copytree(tiny_base, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ModelError, match="holds no weights"):
        run_study(place(grid=f"[[grid]]\nmodel_name_or_path = '{tmp_path / 'empty'}'"))


def test_two_studies_in_one_folder(place):
    study = place()
    (place.folder / "out").mkdir()
    with FolderLock(place.folder / "out").take(), pytest.raises(OutputError, match="is writing"):
        run_study(study)


def test_the_command(place, monkeypatch, capsys):
    (place.folder / "s.toml").write_text("sed = 1", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["study", str(place.folder / "s.toml")])
    with pytest.raises(SystemExit) as ended:
        run_command(study_command)
    captured = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and captured.count("\n") == 0 and "unknown key 'sed'" in captured


def test_the_folder_of_a_cell_is_an_adapter(place):
    run_study(place(grid="[[grid]]\nnum_virtual_tokens = 3"))
    (folder,) = (place.folder / "out" / "cells").iterdir()
    assert load_file(folder / "adapter_model.safetensors")["prompt_embeddings"].shape == (3, 32)


def test_a_long_chinese_text_gives_a_valid_folder_name(place):
    run_study(place(f"hard_prompts = ['{'这条评论的情感' * 30}']", "[[grid]]\nnum_virtual_tokens = 1"))


def test_files_that_no_study_wrote_are_kept(place):
    (place.folder / "out").mkdir()
    (place.folder / "out" / "study.md").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match=r"study\.md"):
        run_study(place())
    assert [p.name for p in (place.folder / "out").iterdir()] == ["study.md"]


@pytest.mark.pictures
def test_charts_of_settings_that_no_longer_vary_are_removed(place):
    run_study(place(grid="[[grid]]\nnum_virtual_tokens = [1, 3]"))
    (place.folder / "out" / "study-mine.svg").write_text("mine", encoding="utf-8")
    run_study(place(grid="[[grid]]\nrows = [4, 'all']"))
    left = {p.name for p in (place.folder / "out").glob("*.svg")}
    assert left == {"study-mine.svg", "study-rows.svg"}
