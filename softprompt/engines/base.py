"""The engine interface: the one door between the training loop and a model."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from softprompt.data.tokenization import Example
from softprompt.prompt.soft_prompt import PromptEmbedding


class Engine(Protocol):
    """The one door between the loop and a model: a window of rows goes in; the summed loss and the target count come
    out, and the prompt's gradient has been accumulated. How a window is cut, padded or packed, moved to a device, and
    where the base's weights come from is behind it."""

    device: torch.device
    compute_dtype: torch.dtype

    def accumulate(
        self, prompt: PromptEmbedding, window: Sequence[Example], grad_scale: Tensor | float
    ) -> tuple[Tensor, int]:
        """Add grad_scale · ∂(summed loss)/∂prompt to `prompt.weight.grad` [P, H] fp32.

        Returns the summed loss (fp64 scalar, detached, on the device, not yet awaited) and the number of targets."""
        ...

    def evaluate(self, prompt: Tensor | None, rows: Sequence[Example]) -> tuple[Tensor, int]:
        """The same sums without a gradient over any number of rows, for a prompt [P, H] or for the bare base (None)."""
        ...

    def losses(self, prompt: Tensor | None, rows: Sequence[Example]) -> list[float]:
        """The summed loss of each row by itself: less the log-likelihood of its targets."""
        ...

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to add up a window in the same order, JSON-able."""
        ...

    def activation_bytes(self, P: int, window: Sequence[Example]) -> int:
        """About what memory a step over `window` takes above the base's, for P virtual tokens."""
        ...
