"""The interfaces of engines. The training loop and the evaluation of losses use a model only through them."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from softprompt.data.tokenization import Example
from softprompt.prompt.soft_prompt import PromptEmbedding

OnRows = Callable[[int], object]  # called with the number of rows that are done; a retry starts at 0 again


def nothing(rows: int) -> None:
    """An `OnRows` that does nothing."""


class LossEngine(Protocol):
    """Computes losses of rows behind a prompt, without a gradient.

    Attributes:
        device: Where the base computes.
        compute_dtype: The dtype of matrix products.
    """

    device: torch.device
    compute_dtype: torch.dtype

    def evaluate(self, prompt: Tensor | None, rows: Sequence[Example], on_rows: OnRows = nothing) -> tuple[Tensor, int]:
        """Return the summed loss of any number of rows, an fp64 scalar on the device without a gradient, and the number
        of their targets.

        Args:
            prompt: [P, H], or None for the bare base.
            on_rows: Called after each micro-batch.

        Raises:
            TrainingError: A single row does not fit in memory.
        """
        ...

    def row_losses(self, prompt: Tensor | None, rows: Sequence[Example], on_rows: OnRows = nothing) -> list[float]:
        """Return the summed loss of each row, which is minus the log-likelihood of its targets. For the arguments and
        errors see `evaluate`."""
        ...


class Engine(LossEngine, Protocol):
    """Computes losses of rows behind a prompt, and the prompt's gradient.

    A window of rows goes in; the summed loss and the number of targets come out, and the prompt's gradient has been
    accumulated. How the window is cut into micro-batches, padded or packed and moved to a device, and where the base's
    weights come from, is up to the engine.
    """

    def accumulate(
        self, prompt: PromptEmbedding, window: Sequence[Example], grad_scale: Tensor | float
    ) -> tuple[Tensor, int]:
        """Add grad_scale · ∂(summed loss)/∂prompt to `prompt.weight.grad` [P, H] fp32.

        Args:
            window: The rows of one optimizer step; empty on a rank that has none.
            grad_scale: Factor of the gradient, usually 1 / targets (times the factor of a gradient scaler).
        Returns:
            The summed loss, an fp64 scalar on the device, detached and without synchronization; the number of targets.

        Raises:
            TrainingError: A single row does not fit in memory.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the settings with which a resumed run cuts windows in the same way, so that its sums are rounded in
        the same way; serializable as JSON."""
        ...

    def activation_bytes(self, P: int, window: Sequence[Example]) -> int:
        """Estimate the memory that a step over `window` with P virtual tokens takes in addition to the base."""
        ...
