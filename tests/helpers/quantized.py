"""Quantized bases, and bases whose weights are rounded by the definitions of the formats, written down naively."""

import copy
import json
from pathlib import Path

import pytest
import torch
from helpers.bases import make_bloom
from helpers.peers import naive_loss, random_examples
from helpers.small_bases import small_base
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from softprompt.config.loader import train_config
from softprompt.engines.factory import make_engine
from softprompt.prompt.soft_prompt import PromptEmbedding

FP32, BF16, CPU = torch.float32, torch.bfloat16, torch.device("cpu")


def base_to_quantize(kind: str) -> PreTrainedModel:
    """A tiny random base whose linear layers have sizes that the formats' blocks divide."""
    if kind == "bloom":
        return make_bloom(n_layer=2, hidden_size=64)
    sizes = {"n_embd": 64} if kind == "gpt2" else {"head_dim": 16}
    return small_base(kind, hidden_size=64, intermediate_size=128, **sizes)


def saved(base: PreTrainedModel, folder: Path, tokenizer: object = None) -> Path:
    """Save a base, and its tokenizer if given, and return the folder."""
    logging.disable_progress_bar()  # so that stderr shows what a program writes
    base.save_pretrained(folder)
    logging.enable_progress_bar()
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
    return folder


def configure(folder: Path, **settings: object) -> None:
    """Write settings into a base's config.json; those that are None are removed."""
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def assert_trains_as(
    stored: PreTrainedModel, reference: PreTrainedModel, tokenizer: object, P: int, loss_error: float, error: float
) -> None:
    """Both engines give a base with hidden size 64 the loss and the gradient of a reference, up to an absolute error of
    the loss and a relative one of the gradient."""
    values, rows = torch.randn(P, 64, generator=torch.Generator().manual_seed(1)), random_examples(9, 20)
    targets = sum(label != -100 for row in rows for label in row.labels)
    leaf = values.clone().requires_grad_()
    expected = naive_loss(reference, leaf, rows)
    (expected * targets / 7).backward()
    for kind in ("packed", "padded"):
        prompt = PromptEmbedding(values.clone())
        engine = make_engine(train_config("mini", engine=kind), stored, tokenizer, FP32, P)
        loss, _ = engine.accumulate(prompt, rows, 1 / 7)
        assert loss.item() / targets == pytest.approx(expected.item(), abs=loss_error)
        assert (prompt.weight.grad - leaf.grad).norm() < error * leaf.grad.norm()


def rounded_by_hand(base: PreTrainedModel, bits: int, quantized: PreTrainedModel) -> PreTrainedModel:
    """A copy of a base in which all linear layers but the head have the values that the formats give them: in 4 bits by
    the definition, in 8 bits by the codes and maxima that `quantized` stores (`codes_by_hand` checks the codes)."""
    base = copy.deepcopy(base)
    for name, module in base.named_modules():
        if module is not base.get_output_embeddings() and isinstance(module, nn.Linear | Conv1D):
            transposed, own = isinstance(module, Conv1D), quantized.get_submodule(name)
            weight = module.weight.data.T if transposed else module.weight.data  # [out, in]
            values = own.weight.data.float() * own.weight.SCB[:, None] / 127 if bits == 8 else nf4(weight)
            module.weight.data = (values.T if transposed else values).contiguous()
    return base


def codes_by_hand(weight: Tensor) -> Tensor:
    """The 8-bit codes of a weight [out, in], as floats: each row in 255 steps of its largest value."""
    return (weight * 127 / weight.abs().amax(1, keepdim=True)).round()


def nf4(weight: Tensor) -> Tensor:
    """The nearest of 16 levels times the largest value of a block of 64; bitsandbytes itself rounds that to 8 bits."""
    functional = pytest.importorskip("bitsandbytes.functional")
    levels = functional.get_4bit_type("nf4", device="cpu").data
    blocks = weight.reshape(-1, 64)
    largest = blocks.abs().amax(1)
    codes = (blocks / largest[:, None]).unsqueeze(-1).sub(levels).abs().argmin(-1)
    kept, state = functional.quantize_blockwise(largest - largest.mean(), blocksize=256)
    largest = functional.dequantize_blockwise(kept, state) + largest.mean()
    return (levels[codes] * largest[:, None]).reshape(weight.shape)
