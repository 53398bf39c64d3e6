"""Which adapter is used where a folder is named that is a run's, or where none is named."""

import os
from pathlib import Path

import pytest
import torch
from helpers.adapters import write_adapter
from helpers.programs import GREEDY, jsonl, run_infer, run_program
from helpers.short_runs import interrupted

import infer
import softprompt
from softprompt.export.plain_model import export
from softprompt.prompt.adapter_io import load_adapter
from softprompt.runs.adapter_search import newest_adapter, resolve_adapter
from softprompt.runs.manifest import Manifest
from softprompt.utils.errors import AdapterError
from softprompt.utils.file_lock import FolderLock

STOPPED_AT = 5  # a checkpoint is written every two steps


@pytest.fixture
def stopped(run_settings) -> Path:
    """A run that was killed after step 5, so that it holds checkpoint-2 and checkpoint-4 alone."""
    interrupted(run_settings, STOPPED_AT)
    return Path("run")


def damage(checkpoint: Path) -> None:
    (checkpoint / "optimizer.safetensors").write_bytes(b"")


def begun(folder: Path) -> Path:
    """A run that has begun and saved no prompt yet."""
    folder.mkdir(parents=True)
    Manifest(folder).write({"metrics.jsonl": b""})
    return folder


def test_a_run_that_has_not_ended_stands_for_its_newest_whole_checkpoint(stopped):
    said: list[str] = []
    assert resolve_adapter(stopped, said.append) == stopped / "checkpoint-4"
    assert len(said) == 1 and "checkpoint-4" in said[0] and "checkpoint-2" not in said[0]
    damage(stopped / "checkpoint-4")
    assert resolve_adapter(str(stopped), said.append) == stopped / "checkpoint-2"
    assert "checkpoint-4" in said[1] and "checkpoint-2" in said[1]
    damage(stopped / "checkpoint-2")
    with pytest.raises(AdapterError, match=r"no checkpoint in it is whole.*checkpoint-4.*checkpoint-2"):
        resolve_adapter(stopped, said.append)
    assert len(said) == 2


def test_a_folder_with_a_prompt_stands_for_itself(place):
    for name in ("a", "a/checkpoint-7"):
        write_adapter(place / name)
        assert resolve_adapter(name, pytest.fail) == Path(name)
    (place / "a/adapter_model.safetensors").unlink()  # a damaged adapter: nothing else is taken in its place
    assert resolve_adapter("a", pytest.fail) == Path("a")


def test_a_run_without_a_checkpoint_is_no_broken_adapter(tmp_path):
    with pytest.raises(AdapterError, match="no prompt yet"):
        resolve_adapter(begun(tmp_path / "run"), pytest.fail)


def test_every_entrance_takes_the_newest_checkpoint_of_a_run_that_has_not_ended(
    stopped, run_settings, tmp_path, capsys, monkeypatch
):
    (tmp_path / "p.jsonl").write_bytes(jsonl({"prompt": "你", "adapter": "run"}))
    whole = load_adapter(stopped / "checkpoint-4").prompt
    capsys.readouterr()

    def says() -> bool:
        printed = capsys.readouterr()
        return (printed.out + printed.err).count("using its newest complete checkpoint, checkpoint-4") == 1

    model = softprompt.SoftPromptModel.from_pretrained(adapter="run")
    assert torch.equal(model.prompt, whole) and says()
    model.load_adapter("run", "again")
    assert torch.equal(model.adapters["again"].prompt, whole) and says()
    for asked in (["--adapter", "run", "--prompt", "你"], ["--prompts_file", "p.jsonl"]):
        told = run_program(infer, [*asked, *GREEDY], capsys, monkeypatch)[1]
        assert told.count("using its newest complete checkpoint, checkpoint-4") == 1
    assert "10 new tokens" in export("run", "plain") and says()
    again = {**run_settings, "output_dir": "again", "init_adapter": "run", "max_steps": 1, "learning_rate": 1e-9}
    learned = softprompt.train(**again).setup.prompt.weight
    assert torch.allclose(learned, whole, atol=1e-6) and says()


def test_the_newest_adapter_is_the_one_written_last(tmp_path):
    runs = tmp_path / "runs"
    assert newest_adapter(runs, pytest.fail) is None
    write_adapter(runs / "b")
    write_adapter(runs / "a/checkpoint-5")
    assert newest_adapter(runs, pytest.fail) == runs / "a/checkpoint-5"
    (runs / "a/checkpoint-5/checksums.json").write_text("{}")
    said: list[str] = []
    assert newest_adapter(runs, said.append) == runs / "b" and "checkpoint-5" in said[0]


def test_an_adapter_that_is_removed_meanwhile_is_not_the_newest(tmp_path, monkeypatch):
    stat = Path.stat

    def removed(path, **options):
        found = stat(path, **options)
        if path.parent.name == "checkpoint-6" and path.parent.exists():
            for file in path.parent.iterdir():
                file.unlink()
            path.parent.rmdir()
        return found

    write_adapter(tmp_path / "a/checkpoint-5")
    write_adapter(tmp_path / "a/checkpoint-6")
    monkeypatch.setattr(Path, "stat", removed)
    assert newest_adapter(tmp_path, lambda said: None) == tmp_path / "a/checkpoint-5"


@pytest.mark.parametrize("runs_now", [False, True])
def test_a_newer_run_that_has_saved_nothing_is_named(runs_now, tmp_path):
    """A run that began before the adapter was written is of interest only while it runs."""
    run, said = begun(tmp_path / "begun"), []
    os.utime(run, (0, 0))
    write_adapter(tmp_path / "whole")
    if runs_now:
        with FolderLock(run).take():
            os.utime(run, (0, 0))
            assert newest_adapter(tmp_path, said.append) == tmp_path / "whole"
    else:
        assert newest_adapter(tmp_path, said.append) == tmp_path / "whole" and not said
        os.utime(run)
        assert newest_adapter(tmp_path, said.append) == tmp_path / "whole"
    assert len(said) == 1 and str(run) in said[0] and "whole" in said[0]


def test_the_base_without_a_prompt_is_mini_where_there_is_no_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out, err = run_program(infer, ["--adapter", "none", "--prompt", "我爱这部电影"], capsys, monkeypatch)
    assert "base is mini" in err and "no prompt" in err
    assert run_infer(["--adapter", "none", "--prompt", "我爱这部电影"], capsys, monkeypatch) == out != "\n"  # greedy
    with pytest.raises(AdapterError, match="--adapter"):
        softprompt.SoftPromptModel.from_pretrained()
