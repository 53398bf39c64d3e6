"""Prompt tuning of frozen language models in plain PyTorch.

`softprompt.train(...)` learns a soft prompt; `softprompt.SoftPromptModel.from_pretrained(...)` generates with one.
`softprompt.errors` holds the exceptions that they raise.
"""

import sys
from typing import TYPE_CHECKING, Any

from softprompt.utils import errors

if TYPE_CHECKING:
    from softprompt.api import SoftPromptModel, train

__all__ = ["SoftPromptModel", "train"]

sys.modules[f"{__name__}.errors"] = errors  # `from softprompt.errors import …`, their place in earlier versions


def __getattr__(name: str) -> Any:
    if name in __all__:
        from softprompt import api  # loads torch, which settings and the mini tasks do without

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
