"""Recognize out-of-memory errors, and retry with smaller batches."""

import torch

from softprompt.utils.errors import TrainingError
from softprompt.utils.progress import say


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether `error` means that a device or the CPU is out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def reason_or_raise(error: Exception) -> str:
    """Return the message of an error in one line of at most 200 characters, or its type if it has no message.

    Raises:
        RuntimeError: `error` itself, if it means out of memory.
    """
    if isinstance(error, RuntimeError) and is_out_of_memory(error):
        raise error
    return " ".join(str(error).split())[:200] or type(error).__name__


def smaller_batch(error: RuntimeError, batch_size: int) -> int:
    """Return half of `batch_size`, and say so, if `error` means out of memory.

    Raises:
        RuntimeError: `error` itself, if it means something else.
        TrainingError: `batch_size` is 1 already.
    """
    if not is_out_of_memory(error):
        raise error
    if batch_size == 1:
        raise TrainingError(
            "out of memory with one answer at a time; give shorter texts, a smaller --max_length or fewer new tokens"
        ) from None
    say(f"out of memory: {batch_size // 2} answers at a time instead of {batch_size}; the answers stay the same")
    return batch_size // 2
