"""Prompt tuning of frozen language models in plain PyTorch.

`softprompt.train(...)` learns a soft prompt; `softprompt.SoftPromptModel.from_pretrained(...)` generates with one.
`softprompt.errors` holds the exceptions that they raise.
"""

# Jupyter offers every name of this module that has no underscore before it, whatever __dir__ says.
import sys as _sys
import typing as _typing

from softprompt.utils import errors as _errors

if _typing.TYPE_CHECKING:
    from softprompt.api import SoftPromptModel, train

__all__ = ["SoftPromptModel", "train"]

_sys.modules[f"{__name__}.errors"] = _errors  # `from softprompt.errors import …`, their place in earlier versions


def __getattr__(name: str) -> _typing.Any:
    if name == "errors":
        return _errors
    if name in __all__:
        from softprompt import api  # loads torch, which settings and the mini tasks do without

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
