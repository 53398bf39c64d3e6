"""Prompt tuning of frozen BLOOM language models in plain PyTorch: `softprompt.train`, `softprompt.SoftPromptModel`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softprompt.api import SoftPromptModel, train

__all__ = ["SoftPromptModel", "train"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for, so that settings and the mini tasks can be used without waiting for torch.
    if name in __all__:
        from softprompt import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
