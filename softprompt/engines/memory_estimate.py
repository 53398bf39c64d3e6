"""Estimates of the memory that BLOOM takes. They are computed from sizes rather than measured, so that equal machines
cut a run into the same micro-batches.

The estimates determine `--tokens_per_microbatch auto`, and a dry run prints them.
"""

import os

import torch
from torch import nn

from softprompt.models.bloom_weights import BloomShape

MEMORY_SHARE = 0.6  # share of a device's memory that is used; the rest is for the allocator, CUDA and other programs
MAX_TOKENS = {"cpu": 1024, "cuda": 16384}  # tokens of the largest automatic micro-batch; on the CPU, more was no faster
MIN_TOKENS = 256  # tokens of the smallest automatic micro-batch
GIB = 2**30


def total_memory(device: torch.device) -> int:
    """Return the bytes of memory that the device has, used or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def base_bytes(shape: BloomShape, dtype: torch.dtype) -> int:
    """Estimate the memory of a frozen BLOOM: linear layers and a copy of the head in the compute dtype, embeddings in
    fp32."""
    linear = 12 * shape.L * shape.H**2
    embeddings = shape.V * shape.H
    return dtype.itemsize * (linear + (embeddings if dtype.itemsize < 4 else 0)) + 4 * embeddings


def resident_bytes(base: nn.Module) -> int:
    """Return the bytes of a loaded base's parameters in this process. Parameters on the meta device do not count; of a
    sharded parameter, only this rank's slice counts."""
    mine = (p.to_local() if hasattr(p, "to_local") else p for p in base.parameters())  # a DTensor's slice
    return sum(p.nbytes for p in mine if not p.is_meta)


def bytes_per_token(shape: BloomShape, dtype: torch.dtype, gradient_checkpointing: bool = False) -> int:
    """Estimate the memory that a token takes until its backward pass.

    Each layer keeps in fp32 the inputs of both layer norms, the queries, the keys and values (twice, because they are
    copied when concatenated with the prompt's) and the output of attention; and in the compute dtype the input of the
    GELU. With gradient checkpointing, each layer keeps only its input, and one layer at a time keeps everything.
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
    """Choose `--tokens_per_microbatch auto`: as many tokens as fit into `memory` (bytes) beside the base and the
    prompt's own activations, at least `MIN_TOKENS` and at most `MAX_TOKENS` of the device."""
    token = bytes_per_token(shape, dtype, gradient_checkpointing)
    return tokens_that_fit(token, base_bytes(shape, dtype) + P * bytes_per_token(shape, dtype), device, memory)


def tokens_that_fit(token: int, held: int, device: torch.device, memory: int) -> int:
    """Return how many tokens of `token` bytes fit into `memory` beside `held` bytes, at least `MIN_TOKENS` and at most
    `MAX_TOKENS` of the device."""
    room = MEMORY_SHARE * memory - held
    return max(MIN_TOKENS, min(MAX_TOKENS[device.type], int(room / token)))
