"""A resumed run has the checkpoint's settings, overridden by those given now; the merged settings are checked."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from helpers.short_runs import interrupted

import softprompt
from softprompt.config.command_line import parse_training
from softprompt.config.loader import train_config
from softprompt.runs.train_state import run_folder
from softprompt.training.auto_resume import with_auto_resume
from softprompt.training.resume_settings import merge_settings
from softprompt.utils.errors import ConfigError

CHECKPOINT = Path("run/checkpoint-8")
OWN = {"model_name_or_path": "base", "dataset": "rows.jsonl", "output_dir": "run"}

# Settings that the run began with, settings given now, and what they are merged to.
MERGED = {
    "a date where the checkpoint has none": (
        {"template": "chat"},
        {"chat_template_date": "2005-06-07"},
        {"chat_template_date": "2005-06-07"},
    ),
    "evaluations": ({"eval_rows": 4}, {"eval_steps": 5}, {"eval_steps": 5, "eval_strategy": "steps"}),
    "evaluations by steps": (
        {"eval_rows": 4, "eval_strategy": "epoch"},
        {"eval_steps": 5},
        {"eval_steps": 5, "eval_strategy": "steps"},
    ),
    "their steps are auto": ({"eval_rows": 4, "eval_steps": 3}, {"eval_steps": "auto"}, {"eval_steps": None}),
    "the best": (
        {"eval_rows": 4},
        {"load_best_model_at_end": True, "eval_steps": 5},
        {"load_best_model_at_end": True, "eval_strategy": "steps"},
    ),
    "the best of what is evaluated anyway": (
        {"eval_rows": 4, "eval_strategy": "epoch"},
        {"load_best_model_at_end": True, "early_stopping_patience": 2},
        {"eval_strategy": "epoch", "early_stopping_patience": 2},
    ),
    "a base elsewhere": ({}, {"model_name_or_path": "./moved"}, {"dataset": "rows.jsonl"}),
    "passes instead of steps": (
        {"max_steps": 9},
        {"num_train_epochs": 1},
        {"num_train_epochs": 1.0, "max_steps": -1},
    ),
    "steps over passes": ({"num_train_epochs": 3.0}, {"max_steps": 9}, {"max_steps": 9}),
    "another precision": ({"bf16": True}, {"fp16": True}, {"fp16": True, "bf16": None}),
    "other held-out rows": ({"eval_rows": 4}, {"eval_dataset": "e.jsonl"}, {"eval_rows": 0}),
    "bits": ({"load_in_8bit": True}, {"load_in_4bit": True}, {"load_in_8bit": False, "load_in_4bit": True}),
    "in layers": ({"load_in_8bit": True}, {"stream_base": True}, {"load_in_8bit": False, "stream_base": True}),
    "its folder goes with it": (
        {"stream_base": True, "offload_folder": "x"},
        {"stream_base": False},
        {"offload_folder": None},
    ),
    "its folder stays": (
        {"stream_base": True, "offload_folder": "x"},
        {"load_in_8bit": True},
        {"offload_folder": "x", "stream_base": False},
    ),
    "its buffer goes with it": ({"streaming": True, "buffer_size": 9}, {"streaming": False}, {"buffer_size": 10_000}),
    "another buffer": ({"streaming": True, "buffer_size": 9}, {"buffer_size": 7}, {"buffer_size": 7}),
    "which is best": (
        {"eval_rows": 4, "greater_is_better": False},
        {"metric_for_best_model": "exact_match"},
        {"greater_is_better": None},
    ),
    "no hub any more": ({"push_to_hub": True, "hub_model_id": "a/b"}, {"push_to_hub": False}, {"hub_model_id": None}),
    "another name there": ({"push_to_hub": True}, {"hub_model_id": "a/b"}, {"push_to_hub": True}),
    "another engine": (
        {"engine": "packed", "tokens_per_microbatch": 9, "gradient_checkpointing": True},
        {"engine": "padded"},
        {"tokens_per_microbatch": None, "gradient_checkpointing": True},
    ),
    "a rate that was found": (
        {"find_learning_rate": True},
        {"learning_rate": 0.1},
        {"find_learning_rate": True, "learning_rate": 0.1},
    ),
}


def saved_arguments(begun):
    return {**train_config(**OWN, **begun).as_dict(), "learning_rate": 0.03}  # a run saves the rate that it takes


def resumed(begun, given, checkpoint=CHECKPOINT):
    state = {"arguments": saved_arguments(begun), "engine": {}}
    config = train_config(**{"resume_from_checkpoint": "run", **given})
    return merge_settings(config, checkpoint, state).as_dict()


@pytest.mark.parametrize("case", MERGED)
def test_given_settings_override_the_checkpoints(case, capsys):
    begun, given, expected = MERGED[case]
    found, told = resumed(begun, given), capsys.readouterr().out.splitlines()
    assert {name: found[name] for name in expected} == expected
    before = saved_arguments(begun)
    changed = {n for n in found if found[n] != before[n] and n not in ("resume_from_checkpoint", "find_learning_rate")}
    assert {line.split(":")[0] for line in told} == {f"--{name}" for name in changed}
    assert all(line.endswith("now: the new one wins") for line in told)


def test_a_date_that_no_chat_template_reads_does_not_prevent_resuming():
    """Earlier versions took it."""
    state = {"arguments": {**saved_arguments({}), "chat_template_date": "2001-02-03"}, "engine": {}}
    found = merge_settings(train_config(resume_from_checkpoint="run"), CHECKPOINT, state)
    assert found.data.chat_template_date is None


@pytest.mark.parametrize(
    "given",
    [
        {"prompt_tuning_init": "TEXT"},
        {"num_virtual_tokens": 3},
        {"class_labels": "a,b"},
        {"vocab_population": 9},
        {"init_adapter": "x"},
        {"preset": "article"},
        {"find_learning_rate": True, "learning_rate": 0.1},
    ],
    ids=str,
)
def test_settings_of_the_initial_prompt_are_the_checkpoints(given, capsys):
    found, before = resumed({}, given), train_config(**OWN).as_dict()
    told = capsys.readouterr().out.splitlines()
    (name, *_) = given
    assert found[name] == before[name]
    assert (
        told[0].startswith(f"--{name}: {before[name]} in checkpoint-8, {given[name]} now") and "checkpoint's" in told[0]
    )


@pytest.mark.parametrize(
    "begun, given, flag",
    [
        ({}, {"eval_steps": 5}, "--eval_steps 5 needs held-out rows"),
        ({"eval_rows": 4, "eval_steps": 5, "load_best_model_at_end": True}, {"eval_strategy": "no"}, "--load_best"),
        ({}, {"buffer_size": 9}, "--buffer_size is only used with --streaming"),
        ({}, {"hub_model_id": "a/b"}, "--hub_model_id is only used with --push_to_hub"),
        ({}, {"learning_rate": -1.0}, "--learning_rate -1.0 must be above 0"),
        ({}, {"bf16": True, "fp16": True}, "--bf16 and --fp16 exclude each other"),
        ({"engine": "padded"}, {"stream_base": True}, "--engine padded"),
    ],
)
def test_merged_settings_are_checked(begun, given, flag):
    with pytest.raises(ConfigError, match=flag) as error:
        resumed(begun, given)
    assert str(CHECKPOINT) in str(error.value)


def test_names_and_types_are_checked_before_the_merge():
    with pytest.raises(ConfigError, match="'learning_rat'; did you mean learning_rate"):
        train_config(resume_from_checkpoint="run", learning_rat=1.0)
    with pytest.raises(ConfigError, match="--num_virtual_tokens 'ten' is not a whole number"):
        train_config(resume_from_checkpoint="run", num_virtual_tokens="ten")


def test_resume_with_a_config_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("s.toml").write_text('eval_steps = 5\nmodel_name_or_path = "./moved"\n')
    config = parse_training(["--config", "s.toml", "--resume_from_checkpoint", "run", "--eval_steps", "7"])
    state = {"arguments": train_config(**OWN, eval_rows=4).as_dict(), "engine": {}}
    found = merge_settings(config, CHECKPOINT, state)
    assert (found.training.eval_strategy, found.training.eval_steps) == ("steps", 7)
    assert (found.model.model_name_or_path, found.data.dataset) == ("./moved", "rows.jsonl")


def test_torchrun_restart_continues_in_the_resumed_runs_folder(monkeypatch, tmp_path):
    """Without --output_dir, and from the newest checkpoint instead of the one that the command names."""
    monkeypatch.setattr("softprompt.training.auto_resume.may_restart", lambda: True)
    (tmp_path / "run/checkpoint-8").mkdir(parents=True)
    (tmp_path / "run/checkpoint-8/trainer_state.json").write_text("{}")
    for named in ("run", "run/checkpoint-8"):
        config = train_config(resume_from_checkpoint=str(tmp_path / named), eval_steps=5)
        assert run_folder(config) == tmp_path / "run" and with_auto_resume(config, False) is config
        again = with_auto_resume(config, True)
        state = {"arguments": train_config(**OWN, eval_rows=4).as_dict(), "engine": {}}
        found = merge_settings(again, tmp_path / "run/checkpoint-9", state).training
        assert (found.output_dir, found.resume_from_checkpoint) == (str(tmp_path / "run"), "newest")
        assert (found.eval_steps, found.eval_strategy) == (5, "steps")


@pytest.fixture
def run(tiny_base, tmp_path, monkeypatch):
    """Settings of a run of 6 steps over 8 rows. It was killed after step 3 and has saved step 2."""
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": f"第{i}题", "output": "好" if i % 2 else "坏"} for i in range(12)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {
        **{"model_name_or_path": str(tiny_base), "dataset": "rows.jsonl", "eval_rows": 4, "output_dir": "run"},
        **{"max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "save_steps": 2},
    }
    interrupted(settings, 3)
    return settings


def evaluated() -> list[int]:
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    return [record["step"] for record in records if "eval_loss" in record]


def test_evaluations_may_be_added(run, capsys):
    softprompt.train(resume_from_checkpoint="run", eval_steps=3, load_best_model_at_end=True)
    assert evaluated() == [3, 6]
    told = capsys.readouterr().out
    assert (
        "--eval_strategy: no in checkpoint-2, steps now" in told and "--eval_steps: None in checkpoint-2, 3 now" in told
    )


def test_base_may_be_moved(run, tmp_path):
    shutil.copytree(run["model_name_or_path"], "moved")
    done = softprompt.train(resume_from_checkpoint="run", model_name_or_path="./moved")
    assert done.config.data.dataset == "rows.jsonl" and done.metrics["epoch"] == pytest.approx(1.5)


def test_without_a_checkpoint_the_given_settings_are_checked_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {**OWN, "resume_from_checkpoint": "newest", "output_dir": "new"}
    with pytest.raises(ConfigError, match="--load_best_model_at_end needs evaluations"):
        softprompt.train(**given, load_best_model_at_end=True)
    assert not list(tmp_path.iterdir())


def test_command_refuses_in_one_line(run, monkeypatch, capsys):
    from softprompt.cli import run_command
    from train import main

    monkeypatch.setattr(
        sys, "argv", ["train.py", "--resume_from_checkpoint", "run", "--eval_strategy", "epoch", "--eval_rows", "0"]
    )
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
