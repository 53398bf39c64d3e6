"""A run replaces and removes only files that runs have written into its output folder."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from helpers.programs import refused
from helpers.short_runs import interrupted, outcome

import softprompt
import train
from softprompt.runs.checkpoints import checkpoints, fault_of, step_of
from softprompt.runs.file_names import MARK
from softprompt.runs.manifest import Manifest
from softprompt.runs.own_files import LOOKS, MANIFEST_FILE, OF_A_RUN
from softprompt.training.callbacks import RunCallbacks
from softprompt.utils.errors import OutputError, Stopped, TrainingError

MINE = b"mine"


def steps(folder: str | Path = "run") -> list[int]:
    return [step_of(path) for path in checkpoints(Path(folder))]


def content(folder: Path) -> dict[str, bytes | str | None]:
    """Everything below a folder: the content of files, the target of links, None for folders."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found


def prompt_in(folder: str) -> bytes:
    return Path(folder, "adapter_model.safetensors").read_bytes()


def older(folder: str | Path = "run") -> None:
    """Make a run look as if it was written by a version without manifests."""
    Path(folder, MANIFEST_FILE).unlink()


def a_file(name: str):
    return lambda folder: (folder / name).write_bytes(MINE)


def a_link(name: str):
    def make(folder: Path) -> None:
        (folder / "elsewhere").write_bytes(MINE)
        (folder / name).symlink_to("elsewhere")

    return make


def a_folder(name: str, *inside: str):
    def make(folder: Path) -> None:
        (folder / name).mkdir(parents=True)
        for file in inside:
            (folder / name / file).write_bytes(MINE)

    return make


def of_trainer(folder: Path) -> None:
    """Write a checkpoint as transformers' Trainer does."""
    a_folder("checkpoint-5", "adapter_model.safetensors", "rng_state.pth")(folder)
    (folder / "checkpoint-5/trainer_state.json").write_text(json.dumps({"global_step": 5, "log_history": []}))
    (folder / "checkpoint-5/adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING"}))


def of_peft(folder: Path) -> None:
    """Write a config as PEFT's save_pretrained does."""
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING"}))


def test_every_file_of_a_run_can_be_recognized():
    assert set(LOOKS) == set(OF_A_RUN)


FOREIGN = {name: a_file(name) for name in (*OF_A_RUN, MANIFEST_FILE)}
FOREIGN |= {
    "loss.png": a_link("loss.png"),
    "metrics.jsonl": a_folder("metrics.jsonl", "a"),
    "adapter_config.json": of_peft,
    "checkpoint-3": a_folder("checkpoint-3", "weights.bin"),
    "checkpoint-4": a_file("checkpoint-4"),
    "checkpoint-5": of_trainer,
    "checkpoint-7": a_link("checkpoint-7"),
}


@pytest.mark.parametrize("more", [[], ["--overwrite_output_dir"], ["--resume_from_checkpoint"]], ids=" ".join)
@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_refused_before_any_data_is_read(name, more, tmp_path, capsys, monkeypatch):
    (tmp_path / "out").mkdir()
    FOREIGN[name](tmp_path / "out")
    argv = ["--output_dir", "out", "--dataset", "is/not/read.jsonl", *more]
    if more == ["--resume_from_checkpoint"] and (name.startswith("checkpoint-") or name == "trainer_state.json"):
        pytest.skip("that is no run to go on with")
    (line,) = [refused(train, argv, capsys, monkeypatch, tmp_path)]
    assert name in line and "another folder" in line


def test_output_to_a_folder_with_a_readme_is_refused(run_settings, tmp_path):
    (tmp_path / "README.md").write_bytes(MINE)
    before = content(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"--output_dir \.: README\.md"):
            softprompt.train(**{**run_settings, "output_dir": ".", "overwrite_output_dir": overwrite})
        assert content(tmp_path) == before
    (tmp_path / "README.md").unlink()
    softprompt.train(**{**run_settings, "output_dir": "."})  # other files may be there
    assert (tmp_path / "rows.jsonl").exists() and "learned with softprompt" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("is_older", [False, True], ids=["manifest", "older"])
def test_overwriting_removes_only_the_run(is_older, run_settings, tmp_path):
    softprompt.train(**run_settings)
    run = tmp_path / "run"
    mine = {"notes.txt": MINE, ".hidden": MINE, "checkpoint-final/weights": MINE, "README": MINE}
    for name, value in mine.items():
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_bytes(value)
    (run / "link").symlink_to("notes.txt")
    if is_older:
        older()
    interrupted({**run_settings, "overwrite_output_dir": True, "seed": 7}, 3)
    assert steps() == [2] and not (run / "adapter_config.json").exists() and not (run / "all_results.json").exists()
    kept = content(run)
    assert mine.items() <= kept.items() and kept["link"] == "notes.txt"


@pytest.mark.parametrize("is_older", [False, True], ids=["manifest", "older"])
@pytest.mark.parametrize("name", ["README.md", "loss.png", "report.html", "checkpoint-99", "checkpoint-4/notes"])
def test_files_added_to_a_run_are_not_replaced(name, is_older, run_settings, tmp_path):
    interrupted(run_settings, 5)
    path = tmp_path / "run" / name
    if name == "checkpoint-99":
        a_folder(name, "weights")(path.parent)
    else:
        path.write_bytes(MINE)
    if is_older:
        older()
    before = content(tmp_path)
    with pytest.raises(OutputError, match=f"{name} would be replaced"):
        softprompt.train(**{**run_settings, "overwrite_output_dir": True})
    if name != "checkpoint-99":
        assert content(tmp_path) == before
    if name == "checkpoint-4/notes":
        softprompt.train(resume_from_checkpoint="run", save_total_limit=1)
        assert path.read_bytes() == MINE and steps() == [4, 13]
    else:
        with pytest.raises(OutputError, match=f"{name} would be replaced|holds a run"):
            softprompt.train(resume_from_checkpoint="run/checkpoint-4")


def test_run_without_a_manifest_is_resumed_and_gets_one(run_settings):
    softprompt.train(**run_settings)
    expected = outcome()
    shutil.rmtree("run")
    interrupted(run_settings, 9)
    older()
    softprompt.train(resume_from_checkpoint="run")
    assert outcome() == expected and steps() == [2, 4, 6, 8, 10, 12, 13]
    older()
    softprompt.train(resume_from_checkpoint="run/checkpoint-6", save_total_limit=2)
    assert outcome()[0] == expected[0] and steps() == [12, 13]
    listed = json.loads(Path("run", MANIFEST_FILE).read_text())["files"]
    assert {"README.md", "metrics.jsonl", "checkpoint-13", "all_results.json"} <= set(listed)


def test_file_added_during_a_run_is_not_replaced(run_settings, monkeypatch):
    """The run ends with an error line, and can be resumed when the file is gone."""
    finish = RunCallbacks.finish

    def late(self):
        Path("run/README.md").write_bytes(MINE)
        return finish(self)

    monkeypatch.setattr(RunCallbacks, "finish", late)
    with pytest.raises(TrainingError, match=r"README\.md.*checkpoint-13 is whole; continue with"):
        softprompt.train(**run_settings)
    assert Path("run/README.md").read_bytes() == MINE
    monkeypatch.setattr(RunCallbacks, "finish", finish)
    Path("run/README.md").unlink()
    softprompt.train(resume_from_checkpoint="run")
    assert Path("run/all_results.json").exists()


def test_checkpoint_with_an_added_file_is_not_replaced(run_settings, monkeypatch):
    interrupted(run_settings, 7)
    on_step = RunCallbacks.on_step

    def late(self, step):
        Path("run/checkpoint-6/notes").write_bytes(MINE)
        on_step(self, step)

    monkeypatch.setattr(RunCallbacks, "on_step", late)
    with pytest.raises(TrainingError, match=r"checkpoint-6.*notes"):
        softprompt.train(resume_from_checkpoint="run/checkpoint-4")
    assert Path("run/checkpoint-6/notes").read_bytes() == MINE and steps() == [2, 4, 6]


def test_hostile_manifest_removes_nothing(tmp_path):
    for name in ("mine", "README.md"):
        (tmp_path / name).write_bytes(MINE)
    (tmp_path / "run").mkdir()
    names = ["../mine", str(tmp_path / "mine"), "notes", "checkpoint-3/../../mine", "runs/../notes", "README.md", 7]
    for files in (names, [n for n in names if n != 7], names[0], None):
        (tmp_path / "run" / "notes").write_bytes(MINE)
        (tmp_path / "run" / MANIFEST_FILE).write_text(
            json.dumps({"written_by": "softprompt run of train.py", "files": files})
        )
        manifest = Manifest(tmp_path / "run")
        assert manifest.names() <= {"README.md"}
        manifest.remove(manifest.names() | {"../mine", "notes"})
        assert (tmp_path / "mine").exists() and (tmp_path / "run" / "notes").exists()


def test_resuming_into_another_runs_folder_removes_that_run(run_settings):
    """Otherwise, after a crash before the first save, resuming would continue the old run or take its best prompt."""
    interrupted({**run_settings, "output_dir": "a"}, 9)
    interrupted({**run_settings, "output_dir": "b", "seed": 7}, 12)
    again = {"resume_from_checkpoint": "a/checkpoint-8", "output_dir": "b", "overwrite_output_dir": True}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingError, match="there is no checkpoint yet"):

        def full(self, step):
            raise TrainingError("no more")

        patch.setattr(RunCallbacks, "on_step", full)
        softprompt.train(**again)
    assert steps("b") == [] and steps("a") == [2, 4, 6, 8]
    softprompt.train(**again)
    assert steps("b") == [10, 12, 13]


def test_best_prompt_of_another_run_is_not_taken(run_settings, capsys):
    """The folder that a run was resumed from may have been overwritten by another run."""
    worst = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}  # an early one
    run_settings |= {**worst, "eval_steps": 2}
    interrupted({**run_settings, "output_dir": "a"}, 9)
    step = json.loads(Path("a/checkpoint-8/trainer_state.json").read_text())["best"]["step"]
    interrupted({**run_settings, "output_dir": "other", "seed": 7}, 9)
    assert step < 8 and fault_of(Path(f"other/checkpoint-{step}")) is None, "the test needs them"
    softprompt.train(resume_from_checkpoint="a/checkpoint-8", output_dir="b")
    assert prompt_in("b") == prompt_in(f"a/checkpoint-{step}") and "warning" not in capsys.readouterr().err
    shutil.rmtree(f"a/checkpoint-{step}")
    shutil.copytree(f"other/checkpoint-{step}", f"a/checkpoint-{step}")
    softprompt.train(resume_from_checkpoint="a/checkpoint-8", output_dir="c")
    assert prompt_in("c") == prompt_in("c/checkpoint-13") and "it belongs to another run" in capsys.readouterr().err


def test_output_folder_and_checkpoints_may_be_links(run_settings, tmp_path):
    """The output folder and its checkpoints may be links. Of a linked checkpoint, only the link is removed."""
    (tmp_path / "disk").mkdir()
    Path("run").symlink_to("disk")
    softprompt.train(**run_settings)
    assert steps("disk")[-1] == 13
    shutil.move("run/checkpoint-6", "far")
    Path("run/checkpoint-6").symlink_to(tmp_path / "far")
    softprompt.train(resume_from_checkpoint="run/checkpoint-6", save_total_limit=2)
    assert steps() == [12, 13] and fault_of(Path("far")) == "it is of step 6"
    softprompt.train(**{**run_settings, "overwrite_output_dir": True, "max_steps": 2})
    assert steps() == [2] and Path("run").is_symlink()


def test_report_written_between_two_runs_is_replaced(run_settings):
    interrupted(run_settings, 5)
    Path("run/report.html").write_text(f"<html>{MARK}")
    softprompt.train(resume_from_checkpoint="run")
    first = Path("run/report.html").read_text()
    assert first != f"<html>{MARK}"
    Path("run/report.html").write_text(f"<html>{MARK}")
    softprompt.train(**{**run_settings, "overwrite_output_dir": True, "max_steps": 2})
    assert Path("run/report.html").read_text() not in (first, f"<html>{MARK}")


def test_folder_of_a_run_without_a_checkpoint_is_free(run_settings):
    interrupted(run_settings, 1)
    softprompt.train(**run_settings)
    assert steps()[-1] == 13


def test_file_added_to_a_stopped_run_is_not_replaced(run_settings, monkeypatch):
    on_step = RunCallbacks.on_step
    monkeypatch.setattr(
        RunCallbacks, "on_step", lambda self, step: (on_step(self, step), signal.raise_signal(signal.SIGINT))
    )
    with pytest.raises(Stopped):
        softprompt.train(**run_settings)
    Path("run/README.md").write_bytes(MINE)
    with pytest.raises(OutputError, match=r"README\.md would be replaced"):
        softprompt.train(resume_from_checkpoint="run")
    assert Path("run/README.md").read_bytes() == MINE
