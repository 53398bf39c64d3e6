"""Estimates of memory, and the default of `--tokens_per_microbatch`, which follows from them.

`base_bytes`, `bytes_per_token` and `auto_tokens` are for BLOOM. They are computed from its sizes, so that equal
machines cut a run into the same micro-batches. For other bases, `activation_measure` counts the bytes of a token. A dry
run prints the estimates.
"""

import os
from itertools import chain

import torch
from torch import nn

from softprompt.models.bitsandbytes_linear import has_bitsandbytes_weight, quantized_bytes
from softprompt.models.bloom_weights import BloomShape
from softprompt.models.precision import is_half
from softprompt.utils.wrapped_tensors import stored_parts

MEMORY_SHARE = 0.6  # share of the device's memory to use; the rest is for the allocator, CUDA and other programs
MAX_TOKENS = {"cpu": 1024, "cuda": 16384}  # largest default micro-batch, in tokens; more was no faster on the CPU
MIN_TOKENS = 256  # smallest default micro-batch, in tokens
GIB = 2**30


def total_memory(device: torch.device) -> int:
    """Return the size of the device's memory in bytes, whether it is in use or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def base_bytes(shape: BloomShape, dtype: torch.dtype) -> int:
    """Estimate the bytes of a frozen BLOOM: linear layers in the compute dtype, embeddings in fp32, and a copy of the
    head in the compute dtype if that is narrower than fp32."""
    linear = 12 * shape.L * shape.H**2
    embeddings = shape.V * shape.H
    return dtype.itemsize * (linear + (embeddings if dtype.itemsize < 4 else 0)) + 4 * embeddings


def resident_bytes(base: nn.Module) -> int:
    """Return the bytes of a loaded base's parameters and buffers in this process; some methods of quantization store
    weights in buffers. Tensors on the meta device do not count; of a sharded parameter, only this rank's slice counts.
    """
    tensors = chain(base.parameters(), base.buffers())
    mine = (part for t in tensors for part in stored_parts(t))
    maxima = (quantized_bytes(m) - m.weight.nbytes for m in base.modules() if has_bitsandbytes_weight(m))  # type: ignore[operator, union-attr]
    return sum(t.nbytes for t in mine if not t.is_meta) + sum(maxima)


def fits_in_fp32(base: nn.Module, device: torch.device) -> bool:
    """Whether fp32 copies of a base's parameters in bf16 and fp16 fit into `MEMORY_SHARE` of the memory beside them."""
    copies = sum(2 * parameter.nbytes for parameter in base.parameters() if is_half(parameter.dtype))
    return resident_bytes(base) + copies <= MEMORY_SHARE * total_memory(device)


def bytes_per_token(shape: BloomShape, dtype: torch.dtype, gradient_checkpointing: bool = False) -> int:
    """Estimate the bytes that a token takes until its backward pass.

    In fp32, each layer keeps the inputs of both layer norms, the queries, the keys and values (twice, because they are
    copied when they are concatenated with the prompt's) and the output of attention. In the compute dtype, it keeps the
    input of the GELU. With gradient checkpointing, each layer keeps only its input, and one layer at a time keeps all.
    """
    layer = 4 * 2 * shape.H + 4 * (3 + 2 + 1) * shape.H + dtype.itemsize * 4 * shape.H
    return shape.L * 4 * shape.H + layer if gradient_checkpointing else shape.L * layer


def auto_tokens(
    shape: BloomShape,
    dtype: torch.dtype,
    P: int,
    device: torch.device,
    memory: int,
    gradient_checkpointing: bool = False,
) -> int:
    """Return the default of `--tokens_per_microbatch` for BLOOM: the number of tokens that fit into `memory` (bytes)
    beside the base and the activations of the P virtual tokens, limited as in `tokens_that_fit`."""
    token = bytes_per_token(shape, dtype, gradient_checkpointing)
    return tokens_that_fit(token, base_bytes(shape, dtype) + P * bytes_per_token(shape, dtype), device, memory)


def tokens_that_fit(token: int, held: int, device: torch.device, memory: int) -> int:
    """Return how many tokens of `token` bytes each fit into `MEMORY_SHARE` of `memory` (bytes) beside `held` bytes that
    are taken; at least `MIN_TOKENS` and at most the device's `MAX_TOKENS`."""
    room = MEMORY_SHARE * memory - held
    return max(MIN_TOKENS, min(MAX_TOKENS[device.type], int(room / token)))
