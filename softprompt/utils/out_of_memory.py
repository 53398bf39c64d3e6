"""Recognize out-of-memory errors, and retry with smaller batches."""

import sys

import torch
from tqdm import tqdm

from softprompt.utils.errors import TrainingError


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether `error` means that a device or the CPU is out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def smaller_batch(error: RuntimeError, batch_size: int) -> int:
    """Return half of `batch_size`, and print a message on stderr, if `error` means out of memory.

    Raises:
        RuntimeError: `error` itself, if it means something else.
        TrainingError: `batch_size` is 1 already.
    """
    if not is_out_of_memory(error):
        raise error
    if batch_size == 1:
        raise TrainingError(
            "out of memory with one answer at a time; give a smaller --max_length or --max_new_tokens"
        ) from None
    tqdm.write(
        f"out of memory: {batch_size // 2} answers at a time instead of {batch_size}; the answers stay the same",
        file=sys.stderr,
    )
    return batch_size // 2
