"""Atomic writes, and what remains when writing or renaming fails or a process is killed."""

from pathlib import Path

import pytest

from softprompt.utils.atomic_io import check_writable, new_folder, remove_folder, remove_leftovers, write_folder
from softprompt.utils.errors import OutputError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def rename_fails(monkeypatch):
    """Renaming a new folder fails; a folder that is set aside can still be moved."""
    rename = Path.rename

    def failing(self, target):
        if self.name.endswith(".new"):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)


def test_a_failed_rename_keeps_the_old_folder(rename_fails, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "old").write_text("0")
    with pytest.raises(OSError, match="No space left"):
        write_folder(tmp_path / "x", {"new": b"1"})
    assert names(tmp_path) == ["x"] and names(tmp_path / "x") == ["old"]


def test_a_folder_that_a_killed_process_set_aside_is_restored(tmp_path):
    """Unless another has taken its name; folders to be removed and incomplete ones are deleted."""
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


def test_a_folder_that_cannot_be_restored_is_kept(tmp_path, monkeypatch):
    aside = tmp_path / ".checkpoint-5-abcd_123.old" / "checkpoint-5"
    aside.mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(PermissionError(13, "no")))
        remove_leftovers(tmp_path, r"checkpoint-\d+")
    assert aside.is_dir()
    remove_leftovers(tmp_path, r"checkpoint-\d+")
    assert names(tmp_path) == ["checkpoint-5"]


def test_only_the_link_to_a_folder_is_replaced_or_removed(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "mine").touch()
    for change in (remove_folder, lambda path: write_folder(path, {"new": b""})):
        (tmp_path / "x").symlink_to("big")
        change(tmp_path / "x")
        assert names(tmp_path / "big") == ["mine"] and not (tmp_path / "x").is_symlink()
    assert names(tmp_path) == ["big", "x"] and names(tmp_path / "x") == ["new"]


def test_replace_false_keeps_a_folder_that_appeared_meanwhile(tmp_path):
    with pytest.raises(FileExistsError), new_folder(tmp_path / "x", replace=False):
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "mine").touch()
    assert names(tmp_path) == ["x"] and names(tmp_path / "x") == ["mine"]


def test_a_folder_is_written_completely_or_not_at_all(tmp_path):
    class Failing(dict):
        def items(self):
            yield "a", b"1"
            raise OSError("disk full")

    write_folder(tmp_path / "x", {"old": b"0"})
    with pytest.raises(OSError, match="disk full"):
        write_folder(tmp_path / "x", Failing())
    assert names(tmp_path) == ["x"] and names(tmp_path / "x") == ["old"]
    write_folder(tmp_path / "x", {"new": b"2"})
    assert names(tmp_path) == ["x"] and names(tmp_path / "x") == ["new"]


def test_check_writable_creates_nothing_and_refuses_files(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OutputError, match=f"--output_dir {path}"):
            check_writable(path, "--output_dir")
    check_writable(tmp_path / "a/b/c", "--output_dir")
    assert names(tmp_path) == ["file"]
