"""`--deterministic`: let torch use only deterministic algorithms, and raise an error where it has none."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Use deterministic algorithms inside the context if `on`, and restore torch's flags afterwards.

    This follows torch's notes on reproducibility. `torch.utils.deterministic.fill_uninitialized_memory` stays off,
    since no code of this package reads uninitialized memory.
    """
    if not on:
        yield
        return
    cudnn, filling = torch.backends.cudnn, torch.utils.deterministic
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    flags = (cudnn.deterministic, cudnn.benchmark, filling.fill_uninitialized_memory)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark, filling.fill_uninitialized_memory = True, False, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark, filling.fill_uninitialized_memory = flags
