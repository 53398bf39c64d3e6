"""The order of rows, and their division into optimizer steps, as in Trainer."""

from collections.abc import Iterator

import torch
from torch import Tensor


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """Return the order of `n` rows in `epoch` (counted from 0), [n] int64: the permutation that Trainer's seeded random
    sampler draws."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed + epoch))


def steps_per_epoch(n: int, rows_per_step: int) -> int:
    """Return the number of optimizer steps of one pass over `n` rows; the last step may have fewer rows."""
    return -(-n // rows_per_step)


def windows(n: int, rows_per_step: int, seed: int, first_step: int = 0) -> Iterator[list[int]]:
    """Yield the row numbers of optimizer steps `first_step`, `first_step + 1`, … without end, epoch after epoch.

    They are those of Trainer with micro-batches of B rows, gradient accumulation over A micro-batches and rows_per_step
    = A·B. The last step of an epoch may have fewer rows.
    """
    per_epoch = steps_per_epoch(n, rows_per_step)
    epoch, skip = divmod(first_step, per_epoch)
    while True:
        order = epoch_order(n, seed, epoch)
        for start in range(skip * rows_per_step, n, rows_per_step):
            yield order[start : start + rows_per_step].tolist()
        epoch, skip = epoch + 1, 0
