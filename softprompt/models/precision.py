"""The device and the compute dtype, which is the dtype of matrix products."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import nn

from softprompt.utils.errors import ConfigError


def resolve_device(name: str) -> torch.device:
    """Return the device that `auto`, `cpu`, `cuda` or `cuda:N` names; `auto` is CUDA where available.

    Raises:
        ConfigError: CUDA is not available, or has no device with this index.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"--device {name}: torch finds no CUDA device here; use --device cpu or a CUDA build of torch"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA device(s), numbered from 0"
        )
    return device


def resolve_dtype(device: torch.device, bf16: bool | None, fp16: bool | None) -> torch.dtype:
    """Return the dtype of matrix products.

    It is the dtype whose flag is True; fp32 if no flag is True and one is False. If both are None, it is fp32 on the
    CPU, and on CUDA bf16 if the GPU supports it in hardware, else fp16.
    """
    if bf16 or fp16:
        return torch.bfloat16 if bf16 else torch.float16
    if device.type == "cpu" or bf16 is False or fp16 is False:
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def is_half(dtype: torch.dtype) -> bool:
    """Whether a dtype is bf16 or fp16."""
    return dtype in (torch.bfloat16, torch.float16)


@contextmanager
def in_fp32(base: nn.Module) -> Iterator[None]:
    """Within this context, the parameters and buffers of `base` in bf16 and fp16 are fp32 copies."""
    narrow = [(each, each.data) for each in chain(base.parameters(), base.buffers()) if is_half(each.dtype)]
    try:
        for each, data in narrow:
            each.data = data.float()
        yield
    finally:
        for each, data in narrow:
            each.data = data


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype of matrix products in this context; None without autocast."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.get_autocast_dtype(device.type) if available and torch.is_autocast_enabled(device.type) else None


def autocast(device: torch.device, compute_dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Return a context in which matrix products run in `compute_dtype`; for fp32 it does nothing."""
    if compute_dtype.itemsize >= 4 or not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, compute_dtype)
