"""Recognise errors that mean out of memory, and retry with smaller pieces."""

import sys

import torch
from tqdm import tqdm

from softprompt.utils.errors import TrainingError


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or the CPU's allocator, had no room."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def smaller_batch(error: RuntimeError, at_once: int) -> int:
    """How many answers to write together after `error`: half as many, which is told, where memory has run out.

    Raises:
        RuntimeError: the error itself, where it is another one.
        TrainingError: there is no room for a single answer.
    """
    if not is_out_of_memory(error):
        raise error
    if at_once == 1:
        raise TrainingError(
            "out of memory with one answer at a time; give a smaller --max_length or --max_new_tokens"
        ) from None
    tqdm.write(f"out of memory: {at_once // 2} answers at a time instead of {at_once}, the same ones", file=sys.stderr)
    return at_once // 2
