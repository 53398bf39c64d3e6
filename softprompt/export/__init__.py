"""Export a base and its learned prompt as one plain transformers model, or the prompt for vLLM; upload a run to the
Hugging Face hub.

In: an adapter folder or a run. Out: a model folder, a folder for vLLM, or a repository on the hub.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "export":
        from softprompt.export.plain_model import export  # loads torch, which parsing flags does not need

        return export
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
