"""Flags that train.py and infer.py have in common. Each function returns a new dataclass field: Python does not allow
two dataclasses to share one."""

from typing import Any

from softprompt.config.schema import option


def device_option() -> Any:
    """Return the field of --device."""
    return option("auto", "Compute on cpu, cuda or cuda:N; auto takes CUDA if there is a GPU, else the CPU.")


def bf16_option() -> Any:
    """Return the field of --bf16."""
    return option(
        None,
        "Compute in bf16 autocast; `--bf16 false` computes in fp32. (default: true on a GPU that supports bf16, else "
        "false)",
    )


def load_in_8bit_option() -> Any:
    """Return the field of --load_in_8bit."""
    return option(
        False, "Quantize the linear layers of a BLOOM's blocks to 8 bits (bitsandbytes int8). Needs the packed engine."
    )


def load_in_4bit_option() -> Any:
    """Return the field of --load_in_4bit."""
    return option(
        False,
        "Quantize the linear layers of a BLOOM's blocks to 4 bits (bitsandbytes NF4 in blocks of 64). "
        "Needs the packed engine.",
    )
