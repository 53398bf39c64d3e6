"""Blocks whose linear layers are kept in 8 or 4 bit and become weights again whenever something passes through them.

The formats are bitsandbytes', under the names that transformers has for them. `load_in_8bit`: a row is int8 times its
largest value ÷ 127 (Dettmers et al. 2022, arXiv:2208.07339, without its second product for outliers). `load_in_4bit`:
blocks of 64 values are NF4, their largest values 8 bit in turn (Dettmers et al. 2023, arXiv:2305.14314). bitsandbytes
has both for CPUs and for CUDA; torchao, the other choice, has NF4 as a prototype and a 4-bit kernel for each device.

Products run in the compute dtype on the weights that come out, there and back, so the prompt's gradient is exactly that
of a base with these weights; embeddings, head, layer norms and biases are as they were.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt.models.bloom_weights import MODULES, BlockWeights, LinearParams, NonBlockWeights, is_bloom
from softprompt.models.loading import freeze, place, read_base
from softprompt.utils.errors import ConfigError


class QuantizedTensor(NamedTuple):
    """A weight [out, in] as `codes`: int8 [out, in] beside the rows' largest values [out] fp32, or NF4, two values a
    byte, beside bitsandbytes' own state."""

    codes: Tensor
    state: Any

    def weight(self, dtype: torch.dtype) -> Tensor:
        """[out, in]"""
        functional = _functional()
        if self.codes.dtype is torch.int8:
            return functional.int8_vectorwise_dequant(self.codes, self.state).to(dtype)
        return functional.dequantize_4bit(self.codes, self.state).to(dtype)

    @property
    def nbytes(self) -> int:
        if self.codes.dtype is torch.int8:
            return self.codes.nbytes + self.state.nbytes
        return self.codes.nbytes + self.state.absmax.nbytes + self.state.state2.absmax.nbytes


class QuantizedBlocks(NamedTuple):
    """The weights of all linear layers of a base's blocks, by block and module: `3.mlp.dense_4h_to_h`."""

    bits: int
    weights: dict[str, QuantizedTensor]

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.weights.values())


def quantize_blocks(base: PreTrainedModel, bits: int, device: torch.device) -> QuantizedBlocks:
    """Round the weights of a BLOOM's blocks, one after the other on `device`. In `base` itself they are on the meta
    device from then on: shapes without values.

    Raises:
        ConfigError: no BLOOM, or bitsandbytes is not installed.
    """
    if not is_bloom(base.config):
        sliced = " with slow_but_exact" if base.config.model_type == "bloom" else ""
        raise ConfigError(
            f"--load_in_{bits}bit is for BLOOM, and {base.name_or_path} is of type {base.config.model_type}{sliced}; "
            "leave it out"
        )
    functional, rounded = _functional(), {}
    for i, block in enumerate(base.transformer.h):
        for name in MODULES:
            module = block.get_submodule(name)
            if isinstance(module, nn.Linear):
                weight = module.weight.detach().to(device, torch.float32)
                rounded[f"{i}.{name}"] = QuantizedTensor(
                    *functional.int8_vectorwise_quant(weight)[:2]
                    if bits == 8
                    else functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
                )
                module.weight = nn.Parameter(torch.empty_like(module.weight, device="meta"), requires_grad=False)
    return QuantizedBlocks(bits, rounded)


def load_quantized(
    name_or_path: str, bits: int, device: torch.device, compute_dtype: torch.dtype
) -> tuple[PreTrainedModel, QuantizedBlocks]:
    """As `model.load_base`, its blocks rounded.

    Raises:
        ModelError, ConfigError: as of `model.read_base` and `quantize_blocks`.
    """
    base = read_base(name_or_path)
    quantised = quantize_blocks(base, bits, device)
    return place(freeze(base, compute_dtype), device), quantised


class QuantizedWeights(NonBlockWeights):
    """All in the memory of one device, the blocks' linear layers in 8 or 4 bit."""

    def __init__(self, base: PreTrainedModel, quantised: QuantizedBlocks, compute_dtype: torch.dtype):
        """base: one that `quantize_blocks` went over, frozen."""
        super().__init__(base, compute_dtype)
        self._blocks, self._rounded, self._dtype = base.transformer.h, quantised.weights, compute_dtype
        one_layer = compute_dtype.itemsize * 12 * self.shape.H**2
        self.own_bytes += quantised.nbytes + 2 * one_layer

    def through(self, order: Sequence[int]) -> Iterator[BlockWeights]:
        return (BlockWeights(*(self._affine(i, name) for name in MODULES)) for i in order)

    def _affine(self, i: int, name: str) -> LinearParams:
        module, rounded = self._blocks[i].get_submodule(name), self._rounded.get(f"{i}.{name}")
        weight = module.weight.detach() if rounded is None else rounded.weight(self._dtype)
        return LinearParams(weight, module.bias.detach())


def _functional() -> Any:
    try:
        from bitsandbytes import functional
    except ImportError:
        raise ConfigError(
            "--load_in_8bit and --load_in_4bit need bitsandbytes: pip install bitsandbytes (or pip install -e "
            '".[quantized]")'
        ) from None
    return functional
