"""How much memory the packed engine needs: arithmetic on sizes, so that the same run is cut the same way everywhere."""

import os

import torch
from torch import nn

from softprompt.models.bloom_weights import Shape

SHARE = 0.6  # of a device's memory that is planned for; the rest is the allocator's, the context's and other programs'
MOST_TOKENS = {"cpu": 1024, "cuda": 16384}  # more is not planned for; on the CPU it was no faster
FEWEST_TOKENS = 256
GIB = 2**30


def total_memory(device: torch.device) -> int:
    """Bytes that the device has, in use or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def base_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """The frozen base: linear layers and a copy of the head in the compute dtype, embeddings in fp32."""
    linear = 12 * shape.L * shape.H**2
    words = shape.V * shape.H
    return dtype.itemsize * (linear + (words if dtype.itemsize < 4 else 0)) + 4 * words


def held_bytes(base: nn.Module) -> int:
    """Of a loaded base in this process's memory: without what lies on the meta device or with other ranks."""
    mine = (p.to_local() if hasattr(p, "to_local") else p for p in base.parameters())  # a DTensor's slice
    return sum(p.nbytes for p in mine if not p.is_meta)


def bytes_per_token(shape: Shape, dtype: torch.dtype, gradient_checkpointing: bool = False) -> int:
    """What the backward pass keeps of a token: each layer's two inputs of layer norms in fp32, queries, keys, values
    (twice: behind the prompt they are copies) and attention's output as attention takes them, and what the GELU
    takes. With checkpointing each layer's input, and one layer whole."""
    layer = 4 * 2 * shape.H + 4 * (3 + 2 + 1) * shape.H + dtype.itemsize * 4 * shape.H
    return shape.L * 4 * shape.H + layer if gradient_checkpointing else shape.L * layer


def auto_tokens(
    shape: Shape, dtype: torch.dtype, P: int, device: torch.device, memory: int, gradient_checkpointing: bool = False
) -> int:
    """`--tokens_per_microbatch auto`: as many as memory (bytes) has room for beside the base and the prompt's own
    activations, and no more than make it faster."""
    token = bytes_per_token(shape, dtype, gradient_checkpointing)
    room = SHARE * memory - base_bytes(shape, dtype) - P * bytes_per_token(shape, dtype)
    return max(FEWEST_TOKENS, min(MOST_TOKENS[device.type], int(room / token)))
