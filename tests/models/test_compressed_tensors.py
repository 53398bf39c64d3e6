"""Checkpoints that are stored in formats of compressed-tensors: they train with dequantized weights, which is said."""

import copy

import pytest
import torch
from helpers.peers import naive_loss, random_examples
from helpers.programs import jsonl, run_program
from helpers.quantized import CPU, FP32, base_to_quantize, saved
from torch import nn

import train
from softprompt.config.loader import train_config
from softprompt.engines.factory import make_engine
from softprompt.models.loading import freeze, load_base
from softprompt.models.quantization import is_quantized
from softprompt.prompt.soft_prompt import PromptEmbedding

pytest.importorskip("compressed_tensors", reason="needs pip install compressed-tensors")

GROUP = 32  # weights that share a scale, in 4 bits
FORMATS = {  # the settings of weights and activations, and the code to which the largest weight is scaled
    "4 bits": ({"num_bits": 4, "strategy": "group", "group_size": GROUP}, None, 7.5),
    "8 bits": ({"num_bits": 8, "strategy": "channel"}, None, 127.5),
    "8 bits, activations too": (
        {"num_bits": 8, "strategy": "channel"},
        {"num_bits": 8, "strategy": "token", "dynamic": True},
        127.5,
    ),
    "FP8, activations too": (
        {"num_bits": 8, "type": "float", "strategy": "channel"},
        {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        448,
    ),
}


def rounded(weight, largest):
    """A weight [out, in] and its scales by the definition of the format; codes are integers, or FP8 up to 448."""
    blocks = weight.reshape(len(weight), -1, GROUP if largest == 7.5 else weight.shape[1])
    scale = blocks.abs().amax(-1, keepdim=True) / largest
    codes = blocks / scale
    half = 0.5  # integers lie between -largest - half and largest - half
    integers = codes.round().clamp(-largest - half, largest - half)
    codes = codes.to(torch.float8_e4m3fn).float() if largest == 448 else integers
    return (codes * scale).reshape(weight.shape), scale.squeeze(-1)


def store(base, form, tokenizer):
    """Save `base` in `stored`, and return a plain base with the weights that the format gives it."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    weights, activations, largest = FORMATS[form]
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    reference, quantized = copy.deepcopy(base), copy.deepcopy(base)
    settings = QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"])
    apply_quantization_config(quantized, settings)
    for name, module in reference.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.data, scale = rounded(module.weight.data, largest)
            quantized.get_submodule(name).weight_scale.data = scale
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
    for name, parameter in stored.named_parameters():
        assert (parameter - reference.get_parameter(name)).norm() <= 1e-5 * parameter.norm()
    values, rows = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)), random_examples(9, 20)
    targets = sum(label != -100 for row in rows for label in row.labels)
    leaf = values.clone().requires_grad_()
    expected = naive_loss(reference, leaf, rows)
    (expected * targets / 7).backward()
    for kind in ("packed", "padded"):
        prompt = PromptEmbedding(values.clone())
        engine = make_engine(train_config("mini", engine=kind), stored, tokenizer, FP32, 3)
        loss, _ = engine.accumulate(prompt, rows, 1 / 7)
        assert loss.item() / targets == pytest.approx(expected.item(), abs=1e-4)
        assert (prompt.weight.grad - leaf.grad).norm() < 1e-3 * leaf.grad.norm()
    (tmp_path / "rows.jsonl").write_bytes(jsonl(*[{"instruction": str(n), "output": "ok"} for n in range(9)]))
    flags = ["--model_name_or_path", "stored", "--dataset", "rows.jsonl", "--output_dir", "run", "--max_steps", "1"]
    out, err = run_program(train, flags, capsys, monkeypatch)
    assert "quantization_config" not in err
    assert "Base stored, stored quantized (compressed-tensors) and dequantized, on cpu" in out
