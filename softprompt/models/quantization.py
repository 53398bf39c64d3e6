"""`--load_in_8bit` and `--load_in_4bit`: the linear layers of BLOOM's blocks are stored in 8 or 4 bits and dequantized,
one block at a time, whenever a pass needs them.

The formats are those of bitsandbytes, and the flags have their names in transformers. `load_in_8bit`: each row of a
weight is stored as int8 values and its absolute maximum; a weight is int8 value · maximum ÷ 127 (Dettmers et al. 2022,
arXiv:2208.07339, without the separate product for outliers). `load_in_4bit`: NF4 in blocks of 64 values, whose absolute
maxima are themselves quantized to 8 bits (Dettmers et al. 2023, arXiv:2305.14314). bitsandbytes has both formats for
CPU and for CUDA; torchao has NF4 only as a prototype, and a different 4-bit kernel for each device.

Matrix products run in the compute dtype on the dequantized weights, in the forward and in the backward pass. So the
prompt's gradient is exactly that of a base with the dequantized weights. Embeddings, head, layer norms and biases are
not quantized.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt.models.bloom_weights import BLOCK_MODULES, BlockWeights, LinearParams, NonBlockWeights, is_bloom
from softprompt.models.loading import freeze, move_to_device, read_base
from softprompt.utils.errors import ConfigError


class QuantizedTensor(NamedTuple):
    """A quantized weight [out, in].

    In 8 bits: `codes` int8 [out, in], `state` the rows' absolute maxima [out] fp32. In 4 bits: `codes` with two NF4
    values per byte, `state` bitsandbytes' QuantState.
    """

    codes: Tensor
    state: Any

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [out, in] in `dtype`."""
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
    """The quantized weights of all linear layers of a base's blocks, by block and module, as in
    `3.mlp.dense_4h_to_h`."""

    bits: int
    weights: dict[str, QuantizedTensor]

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.weights.values())


def quantize_blocks(base: PreTrainedModel, bits: int, device: torch.device) -> QuantizedBlocks:
    """Quantize the linear layers of a BLOOM's blocks, one after the other, on `device`. In `base`, their weights are
    replaced by tensors on the meta device.

    Raises:
        ConfigError: The base is no BLOOM, or bitsandbytes is not installed.
    """
    if not is_bloom(base.config):
        sliced = " with slow_but_exact" if base.config.model_type == "bloom" else ""
        raise ConfigError(
            f"--load_in_{bits}bit is for BLOOM, and {base.name_or_path} is of type {base.config.model_type}{sliced}; "
            "leave it out"
        )
    functional, quantized = _functional(), {}
    for i, block in enumerate(base.transformer.h):
        for name in BLOCK_MODULES:
            module = block.get_submodule(name)
            if isinstance(module, nn.Linear):
                weight = module.weight.detach().to(device, torch.float32)
                quantized[f"{i}.{name}"] = QuantizedTensor(
                    *functional.int8_vectorwise_quant(weight)[:2]
                    if bits == 8
                    else functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
                )
                module.weight = nn.Parameter(torch.empty_like(module.weight, device="meta"), requires_grad=False)
    return QuantizedBlocks(bits, quantized)


def load_quantized(
    name_or_path: str, bits: int, device: torch.device, compute_dtype: torch.dtype
) -> tuple[PreTrainedModel, QuantizedBlocks]:
    """Load a base as `loading.load_base` does, and quantize its blocks.

    Raises:
        ModelError: See `loading.read_base`.
        ConfigError: See `quantize_blocks`.
    """
    base = read_base(name_or_path)
    quantized = quantize_blocks(base, bits, device)
    return move_to_device(freeze(base, compute_dtype), device), quantized


class QuantizedWeights(NonBlockWeights):
    """`BloomWeights` in the memory of one device, with the blocks' linear layers in 8 or 4 bits."""

    def __init__(self, base: PreTrainedModel, quantized: QuantizedBlocks, compute_dtype: torch.dtype):
        """
        Args:
            base: The frozen base whose blocks `quantize_blocks` replaced.
        """
        super().__init__(base, compute_dtype)
        self._blocks, self._quantized, self._dtype = base.transformer.h, quantized.weights, compute_dtype
        one_block = compute_dtype.itemsize * 12 * self.shape.H**2
        self.extra_bytes += quantized.nbytes + 2 * one_block

    def iter_layers(self, order: Sequence[int]) -> Iterator[BlockWeights]:
        return (BlockWeights(*(self._linear_params(i, name) for name in BLOCK_MODULES)) for i in order)

    def _linear_params(self, i: int, name: str) -> LinearParams:
        module, quantized = self._blocks[i].get_submodule(name), self._quantized.get(f"{i}.{name}")
        weight = module.weight.detach() if quantized is None else quantized.dequantize(self._dtype)
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
