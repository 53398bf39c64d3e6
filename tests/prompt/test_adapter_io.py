"""Adapter folders: what is refused and how, and files that are whole or not there."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from softprompt.prompt.adapter_io import json_bytes, load_adapter, newest_adapter
from softprompt.runs.checkpoints import checkpoints, step_of, surplus
from softprompt.utils.atomic_io import check_writable, write_files, write_folder
from softprompt.utils.errors import AdapterError, OutputError


def test_a_saved_adapter_is_read_as_it_was(folder):
    adapter = load_adapter(folder)
    assert torch.equal(adapter.prompt, torch.arange(12.0).reshape(3, 4))
    assert adapter.base_model_name_or_path == "some/base"
    assert adapter.settings == {"template": "chat"}


def edited(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weights(folder: Path, tensors: dict) -> None:
    (folder / "adapter_model.safetensors").write_bytes(save(tensors))


P = "prompt_embeddings"
FAULTS = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    "only a pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        "is a pickle and is not read.*safe_serialization=True",
    ),
    "config not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read as JSON"),
    "config not UTF-8": (lambda f: (f / "adapter_config.json").write_bytes(b"\xff\xfe"), "cannot be read as JSON"),
    "config a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "expected an object"),
    "config too large": (lambda f: (f / "adapter_config.json").write_text(" " * (1 << 20) + "{}"), "larger than"),
    "another kind": (lambda f: edited(f, peft_type="LORA"), "peft_type is 'LORA', expected 'PROMPT_TUNING'"),
    "wrong number": (lambda f: edited(f, num_virtual_tokens=4), r"\(3, 4\), but adapter_config.json says \(4, 4\)"),
    "truncated": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:-5]),
        "not a whole safetensors file",
    ),
    "empty file": (lambda f: (f / "adapter_model.safetensors").write_bytes(b""), "not a whole safetensors file"),
    "foreign tensor": (lambda f: weights(f, {"lm_head.weight": torch.ones(3, 4)}), "holds lm_head.weight, expected"),
    "one dimension": (lambda f: weights(f, {P: torch.ones(12)}), r"float32 \(12,\)"),
    "whole numbers": (lambda f: weights(f, {P: torch.ones(3, 4, dtype=torch.int64)}), "int64"),
    "not finite": (lambda f: weights(f, {P: torch.full((3, 4), torch.nan)}), "not finite"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_adapter_is_refused_in_one_line(fault, folder):
    spoil, message = FAULTS[fault]
    spoil(folder)
    with pytest.raises(AdapterError, match=message) as raised:
        load_adapter(folder)
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(AdapterError, match="no such folder"):
        load_adapter(tmp_path / "nothing")
    with pytest.raises(AdapterError, match=r"run `python -m softprompt train` first"):
        newest_adapter(tmp_path)


def test_adapters_in_half_precision_are_read(folder):
    weights(folder, {P: torch.ones(3, 4, dtype=torch.bfloat16)})
    assert load_adapter(folder).prompt.dtype == torch.float32


def test_the_newest_adapter_is_the_one_written_last(folder, tmp_path):
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    for name in ("runs/b", "runs/a/checkpoint-5"):
        write_folder(tmp_path / name, files)
    assert newest_adapter(tmp_path / "runs") == tmp_path / "runs/a/checkpoint-5"
    write_files(tmp_path / "runs/a", files)
    assert newest_adapter(tmp_path / "runs") == tmp_path / "runs/a"


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    class Spoiled(dict):
        def items(self):
            yield "a", b"1"
            raise OSError("disk full")

    write_folder(tmp_path / "x", {"old": b"0"})
    with pytest.raises(OSError, match="disk full"):
        write_folder(tmp_path / "x", Spoiled())
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and [p.name for p in (tmp_path / "x").iterdir()] == ["old"]
    write_folder(tmp_path / "x", {"new": b"2"})
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and [p.name for p in (tmp_path / "x").iterdir()] == ["new"]


def test_old_checkpoints_go_by_number():
    def left(*arguments) -> list[int]:
        numbers = [5, 10, 20, 100]
        return [n for n in numbers if n not in surplus(numbers, *arguments)]

    assert left(100, None) == [5, 10, 20, 100]
    assert left(100, 2) == [20, 100]
    assert left(100, 2, 5) == [5, 100]
    assert left(100, 1, 10) == [10, 100]  # as in Trainer, the best does not take the newest's place
    assert left(100, 1, 100) == [100]
    assert left(20, 2) == [10, 20]  # what lies behind is of a course that was left


def test_what_a_run_removes_meanwhile_is_looked_over(folder, tmp_path, monkeypatch):
    """A folder of old checkpoints is looked at while a run removes them."""
    for name in ("runs/a/checkpoint-5", "runs/a/checkpoint-6"):
        write_folder(tmp_path / name, {p.name: p.read_bytes() for p in folder.iterdir()})
    (tmp_path / "runs/a/checkpoint-7").write_text("a file")
    assert [step_of(path) for path in checkpoints(tmp_path / "runs/a")] == [5, 6]
    stat = Path.stat

    def gone(path, **more):
        if path.parts[-2:] == ("checkpoint-6", "adapter_model.safetensors") and len(seen.append(path) or seen) > 1:
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return stat(path, **more)

    seen = []
    monkeypatch.setattr(Path, "stat", gone)
    assert newest_adapter(tmp_path / "runs") == tmp_path / "runs/a/checkpoint-5" and len(seen) > 1


def test_places_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OutputError, match="not a folder"):
            check_writable(path, "--output_dir")
    check_writable(tmp_path / "a/b/c", "--output_dir")
    assert not (tmp_path / "a").exists()


def test_json_has_no_nan():
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_bytes({"loss": float("nan")})
