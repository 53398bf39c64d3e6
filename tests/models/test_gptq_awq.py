"""Checkpoints in the 4-bit formats of GPTQ and AWQ: they train as the base whose weights these codes stand for."""

from pathlib import Path

import pytest
import torch
from helpers.programs import jsonl, run_program
from helpers.quantized import CPU, FP32, assert_trains_as, base_to_quantize, configure, saved
from safetensors.torch import load_file, save_file
from torch import nn

import train
from softprompt.models.loading import freeze, load_base
from softprompt.models.quantization import is_quantized

pytest.importorskip("gptqmodel", reason="needs pip install gptqmodel optimum")

GROUP = 32  # weights that share a scale
SETTINGS = {
    "gptq": {"bits": 4, "group_size": GROUP, "desc_act": False, "sym": False, "checkpoint_format": "gptq"},
    "awq": {"bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # in which AWQ stores eight codes


def packed(codes, order=range(8)):
    """Codes of 4 bits [N, 8·K] as int32 [N, K], the first of `order` in the lowest bits."""
    eight = codes.long().reshape(len(codes), -1, 8)
    bits = sum(eight[..., place] << 4 * shift for shift, place in enumerate(order))
    return torch.where(bits < 2**31, bits, bits - 2**32).int()


def quantized(weight, method):
    """A weight [out, in] with the values that 4 bits give it, and the tensors that are stored in its place."""
    groups = weight.T.reshape(-1, GROUP, len(weight))  # [in / GROUP, GROUP, out]
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = ((high - low) / 15).half()
    zero = (-low / scale.float()).round().clamp(1, 15)
    codes = (groups / scale.float() + zero).round().clamp(0, 15)
    values = ((codes - zero) * scale.float()).half().float().reshape(weight.T.shape).T.contiguous()
    codes, zero, scale = codes.reshape(weight.T.shape), zero.squeeze(1), scale.squeeze(1)
    if method == "awq":
        return values, {"qweight": packed(codes, AWQ_ORDER), "qzeros": packed(zero, AWQ_ORDER), "scales": scale}
    tensors = {"qweight": packed(codes.T).T, "qzeros": packed(zero - 1), "scales": scale}
    return values, tensors | {"g_idx": (torch.arange(weight.shape[1]) // GROUP).int()}


def store(base, method, tokenizer):
    """Save `base` in `stored`, and give it the weights that the format stores."""
    folder = Path("stored")
    saved(base, folder, tokenizer)
    tensors = load_file(folder / "model.safetensors")
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.data, stored = quantized(tensors.pop(f"{name}.weight"), method)
            tensors |= {f"{name}.{kind}": tensor for kind, tensor in stored.items()}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    configure(folder, quantization_config={"quant_method": method, **SETTINGS[method]})


@pytest.mark.parametrize("method", SETTINGS)
def test_it_trains_as_the_base_with_the_values_of_its_codes(method, tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reference = base_to_quantize("llama")
    store(reference, method, tokenizer)
    freeze(reference, FP32)
    stored = load_base("stored", CPU, FP32)
    assert is_quantized(stored)
    with torch.no_grad():
        stored(input_ids=torch.arange(5)[None])  # must not prevent a later gradient
    assert_trains_as(stored, reference, tokenizer, 3, 1e-4, 1e-3)
    (tmp_path / "rows.jsonl").write_bytes(jsonl(*[{"instruction": str(n), "output": "ok"} for n in range(9)]))
    flags = ["--model_name_or_path", "stored", "--dataset", "rows.jsonl", "--output_dir", "run", "--max_steps", "1"]
    out, _ = run_program(train, flags, capsys, monkeypatch)
    assert f"Base stored, stored quantized ({method}), on cpu" in out
