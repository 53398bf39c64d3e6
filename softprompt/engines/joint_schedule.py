"""Schedules whose micro-batches contain the prompt: each micro-batch is one forward pass through the base, directly
followed by its backward pass.

The prompt is computed again for each micro-batch. `PrefixSchedule` computes it once per window instead, but its
backward pass through the prompt follows those of all micro-batches.
"""

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor

from softprompt.engines.head import Head
from softprompt.engines.microbatch_engine import LossInputs

BatchT = TypeVar("BatchT")


class JointSchedule(Generic[BatchT]):
    """The `Schedule` that the module's docstring describes. A subclass implements the forward pass."""

    head: Head

    def forward(self, prompt: Tensor, batch: BatchT) -> LossInputs:
        """Run a micro-batch behind the prompt [P, H], P ≥ 0, up to the input of the head."""
        raise NotImplementedError

    def has_targets(self, batch: BatchT) -> bool:
        """Whether a micro-batch contributes to the loss."""
        raise NotImplementedError

    def empty_prompt(self) -> Tensor:
        """Return a prompt without virtual tokens, [0, H]."""
        raise NotImplementedError

    def accumulate(self, prompt: Tensor, batches: Iterable[BatchT], grad_scale: Tensor | float) -> Tensor:
        """See `Schedule.accumulate`."""
        leaf = prompt.detach().requires_grad_()  # the rows' gradients accumulate here
        total = torch.zeros((), device=prompt.device, dtype=torch.float64)
        for batch in filter(self.has_targets, batches):
            loss = self.head.loss(*self.forward(leaf, batch))
            (loss * grad_scale).backward()
            total += loss.detach()
        prompt.backward(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
        return total

    def iter_loss_inputs(self, prompt: Tensor | None, batches: Iterable[BatchT]) -> Iterator[LossInputs]:
        """See `Schedule.iter_loss_inputs`."""
        values = self.empty_prompt() if prompt is None else prompt
        return (self.forward(values, batch) for batch in batches)
