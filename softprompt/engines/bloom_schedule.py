"""The packed engine's schedules for BLOOM: their base class, and the schedule for blocks that are all in memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from softprompt.data.collate import Packed
from softprompt.data.tokenization import Example
from softprompt.engines.bloom import rows_forward, run_prompt
from softprompt.engines.head import LinearHead
from softprompt.engines.memory_estimate import bytes_per_token
from softprompt.engines.microbatch_engine import LossInputs
from softprompt.engines.prefix_schedule import PrefixKV, PrefixSchedule
from softprompt.models.bloom_weights import BloomWeights


class BloomSchedule(PrefixSchedule):
    """Base class of the schedules for BLOOM. A subclass decides in which order micro-batches go through the blocks."""

    def __init__(self, weights: BloomWeights, gradient_checkpointing: bool):
        self.weights, self.gradient_checkpointing = weights, gradient_checkpointing
        self.device, self.compute_dtype = weights.head.device, weights.head.dtype
        self.head = LinearHead(weights.head)

    def activation_bytes(self, P: int, window: Sequence[Example], tokens_per_microbatch: int) -> int:
        """See `Schedule.activation_bytes`."""
        lengths = [len(row.input_ids) for row in window]  # empty on a rank without rows
        largest, longest = self.largest_microbatch(window, tokens_per_microbatch), max(lengths, default=0)
        bias = 4 * self.weights.shape.N * longest * (P + longest)
        kept = self._kept_bytes(P, sum(lengths), largest)
        return self.weights.extra_bytes + kept + bias + self.head.working_bytes(largest)

    def _kept_bytes(self, P: int, tokens: int, tokens_per_microbatch: int) -> int:
        """Estimate the bytes of the activations that are kept for the backward pass.

        Args:
            P: Number of virtual tokens.
            tokens: Number of tokens of the window.
            tokens_per_microbatch: Number of tokens of the largest micro-batch.
        """
        raise NotImplementedError

    def _prompt_or_empty(self, prompt: Tensor | None) -> Tensor:
        """Return the prompt [P, H], or an empty prompt [0, H] if it is None."""
        if prompt is not None:
            return prompt
        return self.weights.embed(torch.zeros(0, dtype=torch.int64, device=self.device))


class MicrobatchMajor(BloomSchedule):
    """Runs each micro-batch through all blocks before the next one. All blocks must be in memory.

    With `gradient_checkpointing`, the activations within blocks are recomputed in the backward pass. For
    `attn_implementation` see `bloom.row_attention`.
    """

    def __init__(self, weights: BloomWeights, gradient_checkpointing: bool = False, attn_implementation: str = "sdpa"):
        super().__init__(weights, gradient_checkpointing)
        self.attn_implementation = attn_implementation

    def run_prompt(self, prompt: Tensor | None) -> PrefixKV:
        return run_prompt(self.weights, self._prompt_or_empty(prompt))

    def rows_forward(self, prefix: PrefixKV, batch: Packed) -> LossInputs:
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        return rows_forward(self.weights, prefix, batch, recompute, self.attn_implementation)

    def _kept_bytes(self, P: int, tokens: int, tokens_per_microbatch: int) -> int:
        shape, dtype = self.weights.shape, self.compute_dtype
        rows = tokens_per_microbatch * bytes_per_token(shape, dtype, self.gradient_checkpointing)
        return rows + P * bytes_per_token(shape, dtype)
