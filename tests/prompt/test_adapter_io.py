"""Adapter folders: what is read, and which faults are refused and how."""

import json
from pathlib import Path

import pytest
import torch
from helpers.bases import make_bloom
from safetensors.torch import save

from softprompt.prompt.adapter_folder import adapter_files, peft_config
from softprompt.prompt.adapter_io import Adapter, json_bytes, load_adapter
from softprompt.utils.atomic_io import write_folder
from softprompt.utils.errors import AdapterError


@pytest.fixture
def adapter_dir(tmp_path: Path) -> Path:
    """A valid adapter folder."""
    prompt = torch.arange(12.0).reshape(3, 4)
    config = peft_config("some/base", make_bloom().config, prompt, "RANDOM")
    write_folder(tmp_path / "adapter", adapter_files(Adapter(prompt, config, {"template": "chat"})))
    return tmp_path / "adapter"


def test_a_saved_adapter_is_read_back(adapter_dir):
    adapter = load_adapter(adapter_dir)
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
def test_a_broken_adapter_is_refused_in_one_line(fault, adapter_dir):
    damage, message = FAULTS[fault]
    damage(adapter_dir)
    with pytest.raises(AdapterError, match=message) as raised:
        load_adapter(adapter_dir)
    assert str(adapter_dir) in str(raised.value) and "\n" not in str(raised.value)


def test_a_missing_folder(tmp_path):
    with pytest.raises(AdapterError, match="no such folder"):
        load_adapter(tmp_path / "nothing")


def test_a_prompt_in_half_precision_is_read_as_fp32(adapter_dir):
    weights(adapter_dir, {P: torch.ones(3, 4, dtype=torch.bfloat16)})
    assert load_adapter(adapter_dir).prompt.dtype == torch.float32


def test_json_has_no_nan():
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_bytes({"loss": float("nan")})
