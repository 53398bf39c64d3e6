"""Files and folders that appear whole, and what is left where writing, renaming or reading fails."""

import os
from pathlib import Path

import pytest
import torch

from softprompt.engines.activation_offload import ActivationStore
from softprompt.mini import make
from softprompt.utils.atomic_io import new_folder, remove_folder, remove_leftovers, write_folder
from softprompt.utils.errors import OutputError, TrainingError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def fails(monkeypatch):
    """The renaming of a new folder to its place fails; a folder that is set aside can be moved."""
    rename = Path.rename

    def failing(self, target):
        if self.name.endswith(".new"):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)


def test_a_folder_that_cannot_take_its_place_leaves_what_was_there(fails, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "old").write_text("0")
    with pytest.raises(OSError, match="No space left"):
        write_folder(tmp_path / "x", {"new": b"1"})
    assert names(tmp_path) == ["x"] and names(tmp_path / "x") == ["old"]


def test_a_folder_that_was_set_aside_by_a_killed_process_comes_back(tmp_path):
    """Unless another has its place by now; what was to be removed, and what was half written, goes."""
    for name, kind in (("checkpoint-5", "old"), ("checkpoint-6", "old"), ("checkpoint-7", "gone")):
        (tmp_path / f".{name}-abcd_123.{kind}" / name).mkdir(parents=True)
        (tmp_path / f".{name}-abcd_123.{kind}" / name / "mine").touch()
    write_folder(tmp_path / "checkpoint-6", {"newer": b""})
    (tmp_path / ".checkpoint-8-abcd_123.new").mkdir()
    (tmp_path / ".metrics.jsonl.77.tmp").touch()
    others = (".checkpoint-8-notes", ".checkpoint-9-abcd_123", ".mine.77.tmp", ".git")
    for name in others:
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path, r"checkpoint-\d+", ["metrics.jsonl"])
    assert names(tmp_path) == sorted(["checkpoint-5", "checkpoint-6", *others])
    assert names(tmp_path / "checkpoint-5") == ["mine"] and names(tmp_path / "checkpoint-6") == ["newer"]


def test_what_cannot_be_put_back_is_not_lost(tmp_path, monkeypatch):
    aside = tmp_path / ".checkpoint-5-abcd_123.old" / "checkpoint-5"
    aside.mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(PermissionError(13, "no")))
        remove_leftovers(tmp_path, r"checkpoint-\d+")
    assert aside.is_dir()
    remove_leftovers(tmp_path, r"checkpoint-\d+")
    assert names(tmp_path) == ["checkpoint-5"]


def test_of_a_link_to_a_folder_the_link_alone_is_replaced_or_removed(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "mine").touch()
    for change in (remove_folder, lambda path: write_folder(path, {"new": b""})):
        (tmp_path / "x").symlink_to("big")
        change(tmp_path / "x")
        assert names(tmp_path / "big") == ["mine"] and not (tmp_path / "x").is_symlink()
    assert names(tmp_path) == ["big", "x"] and names(tmp_path / "x") == ["new"]


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(FileExistsError), new_folder(tmp_path / "x", replace=False):
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "mine").touch()
    assert names(tmp_path) == ["x"] and names(tmp_path / "x") == ["mine"]


def short(descriptor, views, offset):
    return 0


def broken(descriptor, views, offset):
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize("read, told", [(short, "shorter"), (broken, "Input/output error")])
def test_activations_that_cannot_be_read_back(read, told, tmp_path, monkeypatch):
    with ActivationStore(0, tmp_path) as store:
        store.put("a", torch.arange(6.0))
        monkeypatch.setattr(os, "preadv", read)
        with pytest.raises(TrainingError, match=rf"--offload_folder {tmp_path}: .*{told}"):
            store.pop("a")


def test_activations_that_come_back_in_parts(tmp_path, monkeypatch):
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda descriptor, views, at: real(descriptor, [views[0][:5]], at))
    with ActivationStore(0, tmp_path) as store:
        store.put("a", torch.arange(6.0))
        assert torch.equal(store.pop("a"), torch.arange(6.0))


def test_a_mini_base_takes_no_folder_that_holds_something(tmp_path, capsys):
    (tmp_path / "mine").touch()
    assert make.main(["--output_dir", str(tmp_path)]) == OutputError.exit_code
    assert f"--output_dir {tmp_path} is not empty" in capsys.readouterr().err and names(tmp_path) == ["mine"]
