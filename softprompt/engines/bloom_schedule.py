"""Schedules of the packed engine for BLOOM: their common base class, and the schedule for blocks in memory."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from softprompt.data.collate import Packed, has_targets
from softprompt.engines.bloom import PrefixKV, rows_forward, run_prompt, run_rows
from softprompt.engines.linear_cross_entropy import LossInputs
from softprompt.engines.memory_estimate import bytes_per_token, loss_bytes
from softprompt.models.bloom_weights import BloomWeights


class BloomSchedule:
    """The part of a `packed.Schedule` for BLOOM that does not depend on the order of micro-batches and blocks."""

    def __init__(self, weights: BloomWeights, gradient_checkpointing: bool):
        self.weights, self.gradient_checkpointing = weights, gradient_checkpointing
        self.device, self.compute_dtype = weights.head.device, weights.head.dtype

    def activation_bytes(self, P: int, longest: int, tokens: int, tokens_per_microbatch: int) -> int:
        """See `packed.Schedule.activation_bytes`."""
        shape = self.weights.shape
        bias = 4 * shape.N * longest * (P + longest)
        kept = self._kept_bytes(P, tokens, tokens_per_microbatch)
        return self.weights.extra_bytes + kept + bias + loss_bytes(tokens_per_microbatch, shape.V, self.device)

    def _kept_bytes(self, P: int, tokens: int, tokens_per_microbatch: int) -> int:
        """Estimate the memory of what is kept for the backward pass."""
        raise NotImplementedError

    def _prompt_or_empty(self, prompt: Tensor | None) -> Tensor:
        """Return the prompt [P, H]; for None an empty one [0, H]."""
        if prompt is not None:
            return prompt
        return self.weights.embed(torch.zeros(0, dtype=torch.int64, device=self.device))


class MicrobatchMajor(BloomSchedule):
    """Runs one micro-batch after the other, each through all blocks. It is for blocks that are all in memory.

    See `bloom` for the phases. With `gradient_checkpointing`, blocks are recomputed in the backward pass.
    """

    def __init__(self, weights: BloomWeights, gradient_checkpointing: bool = False):
        super().__init__(weights, gradient_checkpointing)

    def accumulate(self, prompt: Tensor, batches: Iterable[Packed], grad_scale: Tensor | float) -> Tensor:
        """See `packed.Schedule.accumulate`."""
        prefix = run_prompt(self.weights, prompt)
        outputs = [*prefix.layers, prefix.last_hidden]
        leaves = [t.detach().requires_grad_() for t in outputs]  # the rows' gradients accumulate here
        total = torch.zeros((), device=prompt.device, dtype=torch.float64)
        for batch in filter(has_targets, batches):
            loss = run_rows(self.weights, PrefixKV(leaves[:-1], leaves[-1]), batch, self.gradient_checkpointing)
            (loss * grad_scale).backward()
            total += loss.detach()
        torch.autograd.backward(outputs, [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves])
        return total

    def iter_loss_inputs(self, prompt: Tensor | None, batches: Iterable[Packed]) -> Iterator[LossInputs]:
        """See `packed.Schedule.iter_loss_inputs`."""
        prefix = run_prompt(self.weights, self._prompt_or_empty(prompt))
        return (rows_forward(self.weights, prefix, batch) for batch in batches)

    def __str__(self) -> str:
        return ""

    def _kept_bytes(self, P: int, tokens: int, tokens_per_microbatch: int) -> int:
        shape, dtype = self.weights.shape, self.compute_dtype
        rows = tokens_per_microbatch * bytes_per_token(shape, dtype, self.gradient_checkpointing)
        return rows + P * bytes_per_token(shape, dtype)
