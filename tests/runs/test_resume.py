"""A resumed run equals an uninterrupted one; checkpoints that are damaged or of another run are detected."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from helpers.bases import make_bloom
from helpers.fault_tools import Child, start_server
from helpers.short_runs import ROWS, interrupted, outcome, rewrite_state
from safetensors.torch import load_file

import softprompt
from softprompt.config.value_parsers import parse_duration
from softprompt.evaluation.evaluator import Evaluator
from softprompt.runs.checkpoints import fault_of
from softprompt.runs.train_state import resume_command
from softprompt.training import run as training_run
from softprompt.utils.errors import CheckpointError, ConfigError, OutputError, Stopped


@pytest.mark.parametrize(
    ("precision", "engine"),
    [({}, "packed"), ({}, "padded"), ({"bf16": True}, "packed"), ({"fp16": True}, "packed")],
    ids=["fp32-packed", "fp32-padded", "bf16-packed", "fp16-packed"],
)
def test_killed_run_resumes_identically(precision, engine, run_settings):
    if engine == "padded":
        del run_settings["tokens_per_microbatch"]
    run_settings |= {**precision, "engine": engine}
    softprompt.train(**run_settings)
    expected = outcome()
    for at in (1, 4, 5, 12):  # before the first checkpoint, on one, between two, before the last
        shutil.rmtree("run")
        interrupted(run_settings, at)
        softprompt.train(**run_settings, resume_from_checkpoint="newest")
        assert outcome() == expected


def test_resume_needs_only_the_checkpoint_flag(run_settings, capsys):
    softprompt.train(**run_settings)
    expected = outcome()
    shutil.rmtree("run")
    interrupted(run_settings, 9)
    softprompt.train(resume_from_checkpoint="run")
    assert "resuming after step 8 of 13" in capsys.readouterr().out
    assert outcome() == expected
    softprompt.train(resume_from_checkpoint="run/checkpoint-6")
    assert "resuming after step 6 of 13" in capsys.readouterr().out
    assert outcome() == expected


def test_resuming_a_finished_run_changes_nothing(run_settings, capsys):
    softprompt.train(**run_settings)
    expected = outcome()
    softprompt.train(**run_settings, resume_from_checkpoint="newest")
    assert "resuming after step 13 of 13; all of them are done" in capsys.readouterr().out
    assert outcome() == expected


@pytest.fixture
def evaluated(monkeypatch) -> list[bool]:
    """For each evaluation so far, whether it was one of the base without a prompt."""
    calls, evaluate = list[bool](), Evaluator.__call__
    monkeypatch.setattr(
        Evaluator, "__call__", lambda self, prompt: calls.append(prompt is None) or evaluate(self, prompt)
    )
    return calls


def test_a_resumed_run_does_not_evaluate_the_base_again(run_settings, evaluated, capsys):
    softprompt.train(**run_settings)
    expected, report = outcome(), json.loads(Path("run/report.json").read_text())
    shutil.rmtree("run")
    interrupted(run_settings, 9)
    assert evaluated.count(True) == 2
    run = softprompt.train(resume_from_checkpoint="run")
    assert evaluated.count(True) == 2 and run.before.answers and outcome() == expected
    again = json.loads(Path("run/report.json").read_text())
    assert again["base_alone"] == report["base_alone"] and again["end"] == report["end"]
    softprompt.train(resume_from_checkpoint="run/checkpoint-6", output_dir="other")
    softprompt.train(resume_from_checkpoint="other/checkpoint-10")  # the state has gone on to the new folder
    assert evaluated.count(True) == 2


@pytest.mark.parametrize("change", ["rows", "max_length", "precision", "an earlier version"])
def test_the_base_is_evaluated_again_if_anything_differs(change, run_settings, evaluated, tmp_path):
    interrupted(run_settings, 9)
    given = {"max_length": {"max_length": 20}, "precision": {"bf16": True}}.get(change, {})
    if change == "rows":
        rows = [{**row, "instruction": row["instruction"] + "？"} for row in ROWS]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    if change == "an earlier version":
        rewrite_state(
            Path("run/checkpoint-8"), lambda state: {k: v for k, v in state.items() if k != "base_evaluation"}
        )
    run = softprompt.train(resume_from_checkpoint="run", ignore_data_skip=True, **given)
    assert evaluated.count(True) == 2
    shutil.rmtree("run")
    fresh = softprompt.train(**{**run_settings, **given})
    assert fresh.before == run.before


def test_resume_without_a_checkpoint_starts_at_step_0(run_settings, capsys):
    softprompt.train(**run_settings, resume_from_checkpoint="newest")
    assert "no checkpoint in run yet: starting at step 0" in capsys.readouterr().out
    assert [record["step"] for record in outcome()[1]] == [3, 5, 6, 9, 10, 12, 13, 13]


def test_each_changed_setting_is_printed_with_the_value_that_wins(run_settings, capsys):
    interrupted(run_settings, 9)
    changed = {**run_settings, "max_steps": 10, "num_virtual_tokens": 3, "save_steps": 1}
    run = softprompt.train(**changed, resume_from_checkpoint="newest")
    told = capsys.readouterr().out.splitlines()
    assert "--max_steps: 13 in checkpoint-8, 10 now: the new one wins" in told
    assert "--save_steps: 2 in checkpoint-8, 1 now: the new one wins" in told
    assert "--num_virtual_tokens: None in checkpoint-8, 3 now: the checkpoint's wins" in told
    assert not any("--eval_rows" in line for line in told)
    adapter = json.loads((run.output_dir / "checkpoint-10" / "adapter_config.json").read_text())
    assert adapter["num_virtual_tokens"] == 10


def test_smaller_microbatches_of_a_checkpoint_are_kept(run_settings):
    interrupted(run_settings, 5)
    state = json.loads(Path("run/checkpoint-4/trainer_state.json").read_text())
    assert state["engine"]["tokens_per_microbatch"] == 30
    finer = {"engine": {"tokens_per_microbatch": 15}}  # as after a device ran out of memory
    rewrite_state(Path("run/checkpoint-4"), lambda state: state | finer)
    run = softprompt.train(resume_from_checkpoint="run")
    assert run.config.training.tokens_per_microbatch == 15


def test_changed_dataset_tokenizer_or_base_is_refused(run_settings, tokenizer, tmp_path):
    interrupted(run_settings, 5)
    with open("rows.jsonl", "a") as file:
        file.write("\n" + json.dumps(ROWS[0]))
    with pytest.raises(
        CheckpointError, match=r"checkpoint-4: the dataset and the held-out rows named now differ .*--ignore_data"
    ):
        softprompt.train(**run_settings, resume_from_checkpoint="newest")
    model = make_bloom()
    model.transformer.h[1].mlp.dense_h_to_4h.bias.data[3] += 1e-6  # one weight of the same base, by a hair
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    path.write_text(path.read_text().replace('"<unk>"', '"<unknown>"'))
    run_settings["model_name_or_path"] = str(tmp_path / "other")
    with pytest.raises(CheckpointError, match="the dataset and the held-out rows and the tokenizer and the base named"):
        softprompt.train(**run_settings, resume_from_checkpoint="newest")
    softprompt.train(**run_settings, resume_from_checkpoint="newest", ignore_data_skip=True)


def test_base_may_be_moved(run_settings, tiny_base, tmp_path):
    interrupted(run_settings, 5)
    shutil.copytree(tiny_base, tmp_path / "elsewhere")
    softprompt.train(**run_settings | {"model_name_or_path": "elsewhere"}, resume_from_checkpoint="newest")


def spoiled(checkpoint: Path) -> list[tuple[str, bytes | None]]:
    """(file, new content or None) for each file: truncated, removed, replaced by another step's, one bit flipped."""
    draw, faults = random.Random(0), []
    other = checkpoint.with_name("checkpoint-2")
    for path in sorted(checkpoint.iterdir()):
        content = path.read_bytes()
        faults += [(path.name, content[:n]) for n in {0, 1, len(content) // 2, len(content) - 1}]
        faults.append((path.name, None))
        if (theirs := (other / path.name).read_bytes()) != content:
            faults.append((path.name, theirs))
        for _ in range(15):
            at, bit = draw.randrange(len(content)), 1 << draw.randrange(8)
            faults.append((path.name, content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]))
    return faults


def test_every_damage_to_a_checkpoint_is_detected(run_settings):
    interrupted(run_settings, 5)
    checkpoint = Path("run/checkpoint-4")
    assert fault_of(checkpoint) is None
    for name, content in spoiled(checkpoint):
        whole = (checkpoint / name).read_bytes()
        if content is None:
            (checkpoint / name).unlink()
        else:
            (checkpoint / name).write_bytes(content)
        assert fault_of(checkpoint), (name, content)
        (checkpoint / name).write_bytes(whole)
    assert fault_of(checkpoint) is None
    checkpoint.rename("run/checkpoint-6")
    assert fault_of(Path("run/checkpoint-6")) == "it is of step 4"


def test_newest_whole_checkpoint_is_taken(run_settings, capsys):
    softprompt.train(**run_settings)
    expected = outcome()
    for step in (13, 12):
        Path(f"run/checkpoint-{step}/optimizer.safetensors").write_bytes(b"")
    Path("run/checkpoint-10/README.md").unlink()
    softprompt.train(**run_settings, resume_from_checkpoint="newest")
    told = capsys.readouterr().out
    assert "run/checkpoint-12: optimizer.safetensors is not as it was written; trying the checkpoint before it" in told
    assert "run/checkpoint-10: README.md is missing; trying the checkpoint before it" in told
    assert "resuming after step 8 of 13" in told
    assert outcome() == expected


def test_resume_refusals(run_settings):
    with pytest.raises(CheckpointError, match="--resume_from_checkpoint nowhere: no checkpoint there"):
        softprompt.train(**run_settings, resume_from_checkpoint="nowhere")
    without = {name: value for name, value in run_settings.items() if name != "output_dir"}
    with pytest.raises(ConfigError, match="without a folder continues the run in --output_dir"):
        softprompt.train(**without, resume_from_checkpoint="newest")
    interrupted(run_settings, 5)
    with pytest.raises(OutputError, match=r"holds a run already; continue it \(--resume_from_checkpoint\)"):
        softprompt.train(**run_settings)
    for step in (2, 4):
        Path(f"run/checkpoint-{step}/adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"run/checkpoint-4: adapter_config\.json is missing; take an earlier"):
        softprompt.train(**run_settings, resume_from_checkpoint="run/checkpoint-4")
    with pytest.raises(CheckpointError, match="no checkpoint in run is whole"):
        softprompt.train(**run_settings, resume_from_checkpoint="newest")


def test_resume_flag_needs_no_value():
    from softprompt.config.command_line import parse_training

    assert parse_training(["--resume_from_checkpoint"]).training.resume_from_checkpoint == "newest"
    assert parse_training(["--resume_from_checkpoint", "r"]).training.resume_from_checkpoint == "r"


def started(tmp_path, *more: str) -> Child:
    """Start `python train.py` on the mini base with many steps."""
    start_server()
    settings = ["--output_dir", "run", "--logging_steps", "1", "--num_train_epochs", "9", "--save_steps", "100000"]
    return Child(tmp_path, [*settings, *more])


def wait_for(process: Child, text: str) -> None:
    """Wait until the process has written `text`."""
    while text not in (process.log.read_text() if process.log.exists() else ""):
        assert process.process.is_alive(), f"ended without {text!r}"
        time.sleep(0.02)


@pytest.mark.parametrize(
    "number, code, when",
    [(signal.SIGTERM, 143, "evaluating"), (signal.SIGINT, 130, "step 1 ")],
)
def test_signal_saves_and_prints_the_resume_command(number, code, when, tmp_path):
    process = started(tmp_path)
    wait_for(process, when)
    os.kill(process.pid, number)
    ended, told = process.ended()
    assert ended == code
    found = re.fullmatch(r"stopped after step (\d+) of 1,800, which is saved; .*: (.+)", told[-1])
    assert found, told
    assert shlex.split(found[2]) == ["python", "train.py", "--resume_from_checkpoint", "run"]
    assert fault_of(tmp_path / "run" / f"checkpoint-{found[1]}") is None


def test_resume_command_under_torchrun(monkeypatch):
    """A single process could not continue a run whose base needed several ranks."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert shlex.split(resume_command(Path("a b"))) == ["python", "train.py", "--resume_from_checkpoint", "a b"]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert resume_command(Path("run")) == "torchrun --nproc_per_node=2 train.py --resume_from_checkpoint run"
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert resume_command(Path("run")).startswith("torchrun --nproc_per_node=2 --nnodes=3 … train.py ")


def test_max_time_stops_the_run(tmp_path):
    code, told = started(tmp_path, "--max_time", "1s").ended()
    assert code == 124 and "stopped after step" in told[-1]


def test_max_time_counts_from_the_start_of_the_command(run_settings, monkeypatch):
    """Loading takes 100 s here, of a limit of 90 s."""
    load = training_run.load_run

    def slow(*args):
        now = time.monotonic
        monkeypatch.setattr(time, "monotonic", lambda: now() + 100)
        return load(*args)

    monkeypatch.setattr(training_run, "load_run", slow)
    with pytest.raises(Stopped, match="stopped after step 1 of"):
        softprompt.train(**run_settings, max_time="90s")


@pytest.mark.parametrize("text, seconds", [("3h30m", 12600), ("45m", 2700), ("90s", 90), ("10", 600), ("1h1s", 3601)])
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["soon", "0", "-3", "1.5h", "m", "3m2h", ""])
def test_invalid_durations_are_refused(text):
    with pytest.raises(ConfigError, match="is not a time such as 3h30m"):
        parse_duration(text)


WORDS = {"prompt_tuning_init": "SAMPLE_VOCAB"}


def test_the_default_learning_rate_follows_the_size_of_the_words_and_is_kept(run_settings, tiny_base):
    words = load_file(tiny_base / "model.safetensors")["transformer.word_embeddings.weight"].double()
    rate = float(f"{0.22 * words.square().mean().sqrt():.0e}")
    whole = softprompt.train(**run_settings, **WORDS)
    assert whole.config.training.learning_rate == rate and whole.history[0]["learning_rate"] < rate
    expected = outcome()
    shutil.rmtree("run")
    interrupted({**run_settings, **WORDS}, 9)
    saved = json.loads(Path("run/checkpoint-8/trainer_state.json").read_text())["arguments"]
    assert saved["learning_rate"] == rate
    softprompt.train(resume_from_checkpoint="run")
    assert outcome() == expected


@pytest.mark.parametrize(("init", "rate"), [("SAMPLE_VOCAB", 0.03), ("RANDOM", 0.1)])
def test_a_checkpoint_without_a_rate_continues_at_the_default_of_its_version(init, rate, run_settings, capsys):
    """Versions whose default did not depend on the base saved null."""
    run_settings = {**run_settings, "prompt_tuning_init": init, "learning_rate": rate}
    softprompt.train(**run_settings)
    expected = outcome()
    shutil.rmtree("run")
    interrupted(run_settings, 9)
    without = {"learning_rate": None}
    rewrite_state(Path("run/checkpoint-8"), lambda state: {**state, "arguments": {**state["arguments"], **without}})
    capsys.readouterr()
    softprompt.train(resume_from_checkpoint="run")
    assert outcome() == expected and f"learning rate {rate} (linear)" in capsys.readouterr().out
