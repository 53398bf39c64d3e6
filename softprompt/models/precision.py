"""The device and the dtype in which matrix products are computed."""

import torch

from softprompt.utils.errors import ConfigError


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` → a device that is there.

    Raises:
        ConfigError: CUDA asked for where there is none, or a card of a number that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"--device {name}: torch finds no CUDA device here; use --device cpu or a CUDA build of torch"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: there are only {torch.cuda.device_count()} CUDA devices, numbered from 0")
    return device


def resolve_dtype(device: torch.device, bf16: bool | None, fp16: bool | None) -> torch.dtype:
    """The dtype of matrix products: what is asked for; else fp32 on the CPU, and on CUDA bf16 where the card has it,
    else fp16. Saying `false` to one of them without saying `true` to the other asks for fp32."""
    if bf16 or fp16:
        return torch.bfloat16 if bf16 else torch.float16
    if device.type == "cpu" or bf16 is False or fp16 is False:
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def autocast(device: torch.device, compute_dtype: torch.dtype) -> torch.autocast:
    """Matrix products in `compute_dtype`; nothing is cast where that is fp32."""
    return torch.autocast(device.type, compute_dtype, enabled=compute_dtype is not torch.float32)
