"""Checkpoints in formats of compressed-tensors: they train with dequantized weights, and the run says so."""

import copy

import pytest
import torch
from helpers.programs import jsonl, run_program
from helpers.quantized import CPU, FP32, assert_trains_as, base_to_quantize, saved
from torch import nn

import train
from softprompt.models.loading import freeze, load_base
from softprompt.models.quantization import is_quantized

pytest.importorskip("compressed_tensors", reason="needs pip install compressed-tensors")

GROUP = 32  # weights that share a scale, in 4 bits
WEIGHTS = {
    "4 bits": {"num_bits": 4, "strategy": "group", "group_size": GROUP},
    "8 bits": {"num_bits": 8, "strategy": "channel"},
    "FP8": {"num_bits": 8, "type": "float", "strategy": "channel"},
}
ACTIVATIONS = {
    "8 bits": {"num_bits": 8, "strategy": "token", "dynamic": True},
    "FP8": {"num_bits": 8, "type": "float", "strategy": "tensor"},
}
FORMATS = {  # of the matrices of attention, of all others, and of activations
    "4 bits": ("4 bits", "4 bits", None),
    "8 bits": ("8 bits", "8 bits", None),
    "two formats": ("4 bits", "8 bits", None),
    "8 bits, activations too": ("8 bits", "8 bits", "8 bits"),
    "FP8, activations too": ("FP8", "FP8", "FP8"),
}


def rounded(weight, form):
    """A weight [out, in] with the values that a format gives it, and its scales."""
    blocks = weight.reshape(len(weight), -1, GROUP if form == "4 bits" else weight.shape[1])
    largest = blocks.abs().amax(-1, keepdim=True)
    if form == "FP8":
        scale = largest / 448
        codes = (blocks / scale).to(torch.float8_e4m3fn).float()
    else:
        half = 8 if form == "4 bits" else 128  # codes lie in [-half, half - 1]
        scale = largest / (half - 0.5)
        codes = (blocks / scale).round().clamp(-half, half - 1)
    return (codes * scale).reshape(weight.shape), scale.squeeze(-1)


def store(base, form, tokenizer):
    """Save `base` in `stored`, and return a plain base with the weights that the format gives it."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    of_attention, of_others, of_activations = FORMATS[form]
    activations = ACTIVATIONS.get(of_activations)
    groups = {
        name: {"targets": targets, "weights": WEIGHTS[weights], "input_activations": activations}
        for name, targets, weights in (
            ("group_0", ["re:.*self_attn.*_proj"], of_attention),
            ("group_1", ["re:.*mlp.*_proj"], of_others),
        )
    }
    reference, quantized = copy.deepcopy(base), copy.deepcopy(base)
    apply_quantization_config(quantized, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    for name, module in reference.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            weights = of_attention if "self_attn" in name else of_others
            module.weight.data, scale = rounded(module.weight.data, weights)
            quantized.get_submodule(name).weight_scale.data = scale
            if of_activations == "FP8":
                quantized.get_submodule(name).input_scale.data.fill_(0.05)
    compressor = ModelCompressor.from_pretrained_model(quantized)
    compressor.compress_model(quantized)
    saved(quantized, "stored", tokenizer)
    compressor.update_config("stored")
    return reference


@pytest.mark.parametrize("form", FORMATS)
def test_it_trains_with_the_dequantized_weights_and_says_so(form, tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reference = freeze(store(base_to_quantize("llama"), form, tokenizer), FP32)
    stored = load_base("stored", CPU, FP32)
    assert not is_quantized(stored)
    assert {name for name, _ in stored.named_parameters()} == {name for name, _ in reference.named_parameters()}
    for name, parameter in stored.named_parameters():
        assert (parameter - reference.get_parameter(name)).norm() <= 1e-5 * parameter.norm()
    assert_trains_as(stored, reference, tokenizer, 3, 1e-4, 1e-3)
    (tmp_path / "rows.jsonl").write_bytes(jsonl(*[{"instruction": str(n), "output": "ok"} for n in range(9)]))
    flags = ["--model_name_or_path", "stored", "--dataset", "rows.jsonl", "--output_dir", "run", "--max_steps", "1"]
    out, _ = run_program(train, flags, capsys, monkeypatch)
    assert "Base stored, stored quantized (compressed-tensors) and dequantized, on cpu" in out
