"""Linear layers with weights in bitsandbytes' 8-bit and 4-bit formats, computed with the dequantized weights.

bitsandbytes has both formats for CPU and for CUDA. In 8 bits, each row of a weight is stored as int8 values and its
absolute maximum; a weight is int8 value · maximum ÷ 127 (Dettmers et al. 2022, arXiv:2208.07339). In 4 bits, blocks of
values are stored as NF4 (or FP4) codes and their absolute maxima, which may themselves be quantized to 8 bits (Dettmers
et al. 2023, arXiv:2305.14314).

`use_dequantized_weights` replaces the forward of bitsandbytes' modules: a matrix product dequantizes its weight, in the
forward and again in the backward pass, and runs in the dtype that autocast gives. So losses and gradients are exactly
those of a base with the dequantized weights. bitsandbytes' own forward (0.50) is not used, because

- in 8 bits it also quantizes activations. Columns with outliers are left out, and which columns these are depends on
  all tokens of a batch (LLM.int8), so that a row's loss and gradient would depend on the rows beside it;
- in 4 bits, on CPUs with AVX-512 BF16, the first forward without a gradient repacks the weights in place and rounds
  their maxima to bf16. Later gradients do not pass through the repacked layers, and no error is raised.
"""

import copy
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def import_functional() -> ModuleType:
    """Import and return `bitsandbytes.functional`.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    from logging import ERROR, getLogger

    getLogger("bitsandbytes.backends.cpu.ops").setLevel(ERROR)  # warns about a kernel that only its own forward uses
    from bitsandbytes import functional

    return functional  # type: ignore[no-any-return]


def has_bitsandbytes_weight(module: nn.Module) -> bool:
    """Whether a module's weight is stored in one of bitsandbytes' formats (LLM.int8 may also keep it in fp16)."""
    weight = getattr(module, "weight", None)
    if type(weight).__name__ == "Params4bit":
        return weight.quant_state is not None  # type: ignore[union-attr]
    return type(weight).__name__ == "Int8Params" and weight.dtype is torch.int8  # type: ignore[union-attr]


def dequantize(module: Any, dtype: torch.dtype) -> Tensor:
    """Return the weight [out, in] of a module for which `has_bitsandbytes_weight` is true, in `dtype`."""
    functional, codes = import_functional(), module.weight.data
    if codes.dtype is torch.int8 and type(module.weight).__name__ == "Int8Params":
        return functional.int8_vectorwise_dequant(codes, _row_maxima(module)).to(dtype)  # type: ignore[no-any-return]
    state = copy.copy(module.weight.quant_state)
    state.dtype = dtype if dtype.itemsize <= 4 else torch.float32
    return functional.dequantize_4bit(codes, state).to(dtype)  # type: ignore[no-any-return]


def quantized_bytes(module: Any) -> int:
    """Return the bytes of the weight of a module for which `has_bitsandbytes_weight` is true: of its codes and of their
    absolute maxima."""
    codes: int = module.weight.nbytes
    if type(module.weight).__name__ == "Int8Params":
        return codes + _row_maxima(module).nbytes
    state = module.weight.quant_state
    return codes + state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)


def use_dequantized_weights(base: nn.Module) -> None:
    """Make all bitsandbytes modules of `base` compute with the dequantized weights, in place."""
    for module in base.modules():
        if has_bitsandbytes_weight(module):
            module.forward = partial(_forward, module)


def _row_maxima(module: Any) -> Tensor:
    """Return the absolute maximum of each row of an 8-bit weight, [out] fp32; bitsandbytes moves it at the first use of
    its own forward."""
    maxima: Tensor = module.state.SCB if module.weight.SCB is None else module.weight.SCB
    return maxima


def _forward(module: nn.Module, x: Tensor) -> Tensor:
    """Compute a linear layer: x [..., in] → [..., out], in the dtype that `nn.Linear` would return."""
    autocasts = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocasts else x.dtype
    return _DequantizedLinear.apply(x.to(dtype), module)  # type: ignore[no-any-return]


class _DequantizedLinear(torch.autograd.Function):
    """A frozen linear layer that keeps no dequantized weight for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any) -> Tensor:
        ctx.module = module
        bias = None if module.bias is None else module.bias.to(x.dtype)
        return F.linear(x, dequantize(module, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gradient,) = grads
        return gradient @ dequantize(ctx.module, gradient.dtype), None
