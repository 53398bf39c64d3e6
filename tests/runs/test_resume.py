"""A resumed run is the run that was not interrupted; what is broken or of another run is recognised."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.bases import make_bloom
from helpers.interrupting import Killed, interrupted, restated  # noqa: F401 (Killed is test_safety's)
from helpers.interruptions import ROWS, outcome

import softprompt
from softprompt.config.value_parsers import parse_duration
from softprompt.runs.checkpoints import fault_of
from softprompt.runs.train_state import resume_command
from softprompt.utils.errors import CheckpointError, ConfigError, OutputError


@pytest.mark.parametrize("engine", ["packed", "padded"])
@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}], ids=["fp32", "bf16", "fp16"])
def test_killed_and_resumed_is_the_same_run(precision, engine, settings):
    if engine == "padded":
        del settings["tokens_per_microbatch"]
    settings |= {**precision, "engine": engine}
    softprompt.train(**settings)
    expected = outcome()
    for at in (1, 4, 5, 12):  # before the first checkpoint, on one, between two, before the last
        shutil.rmtree("run")
        interrupted(settings, at)
        softprompt.train(**settings, resume_from_checkpoint="newest")
        assert outcome() == expected


def test_nothing_but_the_checkpoint_need_be_named(settings, capsys):
    softprompt.train(**settings)
    expected = outcome()
    shutil.rmtree("run")
    interrupted(settings, 9)
    softprompt.train(resume_from_checkpoint="run")
    assert "resuming after step 8 of 13" in capsys.readouterr().out
    assert outcome() == expected
    softprompt.train(resume_from_checkpoint="run/checkpoint-6")
    assert "resuming after step 6 of 13" in capsys.readouterr().out
    assert outcome() == expected


def test_a_finished_run_says_so(settings, capsys):
    softprompt.train(**settings)
    expected = outcome()
    softprompt.train(**settings, resume_from_checkpoint="newest")
    assert "resuming after step 13 of 13; all of them are done" in capsys.readouterr().out
    assert outcome() == expected


def test_without_a_checkpoint_it_starts_anew(settings, capsys):
    softprompt.train(**settings, resume_from_checkpoint="newest")
    assert "no checkpoint in run yet: starting at step 0" in capsys.readouterr().out
    assert [record["step"] for record in outcome()[1]] == [3, 5, 6, 9, 10, 12, 13, 13]


def test_each_setting_that_differs_is_told_with_the_value_that_wins(settings, capsys):
    interrupted(settings, 9)
    changed = {**settings, "max_steps": 10, "num_virtual_tokens": 3, "save_steps": 1}
    run = softprompt.train(**changed, resume_from_checkpoint="newest")
    told = capsys.readouterr().out.splitlines()
    assert "--max_steps: 13 in checkpoint-8, 10 now: the new one wins" in told
    assert "--save_steps: 2 in checkpoint-8, 1 now: the new one wins" in told
    assert "--num_virtual_tokens: None in checkpoint-8, 3 now: the checkpoint's wins" in told
    assert not any("--eval_rows" in line for line in told)
    adapter = json.loads((run.output_dir / "checkpoint-10" / "adapter_config.json").read_text())
    assert adapter["num_virtual_tokens"] == 10


def test_a_finer_cut_is_kept(settings):
    interrupted(settings, 5)
    state = json.loads(Path("run/checkpoint-4/trainer_state.json").read_text())
    assert state["engine"] == {"tokens_per_microbatch": 30}
    finer = {"engine": {"tokens_per_microbatch": 15}}  # as after a device ran out of memory
    restated(Path("run/checkpoint-4"), lambda state: state | finer)
    run = softprompt.train(resume_from_checkpoint="run")
    assert run.config.training.tokens_per_microbatch == 15


def test_another_dataset_tokenizer_or_base_is_refused(settings, tokenizer, tmp_path):
    interrupted(settings, 5)
    with open("rows.jsonl", "a") as file:
        file.write("\n" + json.dumps(ROWS[0]))
    with pytest.raises(
        CheckpointError, match=r"checkpoint-4: the dataset and the held-out rows named now differ .*--ignore_data"
    ):
        softprompt.train(**settings, resume_from_checkpoint="newest")
    model = make_bloom()
    model.transformer.h[1].mlp.dense_h_to_4h.bias.data[3] += 1e-6  # one weight of the same base, by a hair
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    path.write_text(path.read_text().replace('"<unk>"', '"<unknown>"'))
    settings["model_name_or_path"] = str(tmp_path / "other")
    with pytest.raises(CheckpointError, match="the dataset and the held-out rows and the tokenizer and the base named"):
        softprompt.train(**settings, resume_from_checkpoint="newest")
    softprompt.train(**settings, resume_from_checkpoint="newest", ignore_data_skip=True)


def test_where_a_base_lies_does_not_matter(settings, tiny_base, tmp_path):
    interrupted(settings, 5)
    shutil.copytree(tiny_base, tmp_path / "elsewhere")
    softprompt.train(**settings | {"model_name_or_path": "elsewhere"}, resume_from_checkpoint="newest")


def spoiled(checkpoint: Path) -> list[tuple[str, bytes | None]]:
    """Every file truncated at several lengths, removed, of another step, or with one bit flipped somewhere."""
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


def test_a_checkpoint_is_whole_or_recognised_as_broken(settings):
    interrupted(settings, 5)
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


def test_the_next_older_checkpoint_is_taken(settings, capsys):
    softprompt.train(**settings)
    expected = outcome()
    for step in (13, 12):
        Path(f"run/checkpoint-{step}/optimizer.safetensors").write_bytes(b"")
    Path("run/checkpoint-10/README.md").unlink()
    softprompt.train(**settings, resume_from_checkpoint="newest")
    told = capsys.readouterr().out
    assert "run/checkpoint-12: optimizer.safetensors is not as it was written; the one before is tried" in told
    assert "run/checkpoint-10: README.md is missing; the one before is tried" in told
    assert "resuming after step 8 of 13" in told
    assert outcome() == expected


def test_what_cannot_be_resumed(settings):
    with pytest.raises(CheckpointError, match="--resume_from_checkpoint nowhere: no checkpoint there"):
        softprompt.train(**settings, resume_from_checkpoint="nowhere")
    without = {name: value for name, value in settings.items() if name != "output_dir"}
    with pytest.raises(ConfigError, match="without a folder goes on with --output_dir"):
        softprompt.train(**without, resume_from_checkpoint="newest")
    interrupted(settings, 5)
    with pytest.raises(OutputError, match=r"holds a run already; go on with it \(--resume_from_checkpoint\)"):
        softprompt.train(**settings)
    for step in (2, 4):
        Path(f"run/checkpoint-{step}/adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"run/checkpoint-4: adapter_config\.json is missing; take an earlier"):
        softprompt.train(**settings, resume_from_checkpoint="run/checkpoint-4")
    with pytest.raises(CheckpointError, match="no checkpoint in run is whole"):
        softprompt.train(**settings, resume_from_checkpoint="newest")


def test_the_flag_needs_no_value():
    from softprompt.cli import parse_training

    assert parse_training(["--resume_from_checkpoint"]).training.resume_from_checkpoint == "newest"
    assert parse_training(["--resume_from_checkpoint", "r"]).training.resume_from_checkpoint == "r"


def started(tmp_path, *more: str) -> subprocess.Popen:
    """`python train.py` on the mini base, many steps, in a process of its own."""
    train = Path(softprompt.__file__).parent.parent / "train.py"
    settings = ["--output_dir", "run", "--logging_steps", "1", "--num_train_epochs", "9", "--save_steps", "100000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, str(train), *settings, *more], cwd=tmp_path, **pipes)


def wait_for(process: subprocess.Popen, text: str) -> None:
    for line in process.stderr:
        if text in line:
            return
    raise AssertionError(f"ended without {text!r}")


@pytest.mark.parametrize(
    "number, code, when",
    [(signal.SIGTERM, 143, "evaluating"), (signal.SIGINT, 130, "step 1 "), (signal.SIGINT, 130, "step 3 ")],
)
def test_a_signal_saves_and_says_how_to_go_on(number, code, when, tmp_path):
    process = started(tmp_path)
    wait_for(process, when)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == code
    last = told.strip().splitlines()[-1]
    way_on = "go on with: python train.py --resume_from_checkpoint run"
    found = re.fullmatch(rf"stopped after step (\d+) of 1,800, which is saved; {way_on}", last)
    assert found, told
    assert fault_of(tmp_path / "run" / f"checkpoint-{found[1]}") is None


def test_ranks_go_on_as_ranks(monkeypatch):
    """One process alone could not, where they shared a base out."""
    assert resume_command(Path("a b")) == "python train.py --resume_from_checkpoint 'a b'"
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert resume_command(Path("run")) == "torchrun --nproc_per_node=2 train.py --resume_from_checkpoint run"
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert resume_command(Path("run")).startswith("torchrun --nproc_per_node=2 --nnodes=3 … train.py ")


def test_time_runs_out(tmp_path):
    process = started(tmp_path, "--max_time", "1s")
    _, told = process.communicate(timeout=60)
    assert process.returncode == 124 and "stopped after step" in told.strip().splitlines()[-1]


@pytest.mark.parametrize("text, seconds", [("3h30m", 12600), ("45m", 2700), ("90s", 90), ("10", 600), ("1h1s", 3601)])
def test_times(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["soon", "0", "-3", "1.5h", "m", "3m2h", ""])
def test_what_is_no_time(text):
    with pytest.raises(ConfigError, match="3h30m"):
        parse_duration(text)
