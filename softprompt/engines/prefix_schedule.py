"""The packed schedule: rows without padding, behind a prompt that is computed once per window.

A window is the rows of one optimizer step. Computing its prompt only once is exact, because attention is causal: the
virtual tokens precede the text, so their hidden states do not depend on it, and all rows share their keys and values.

The prompt's gradient is computed in three phases:

1. Prompt pass, once per window (`run_prompt`). The prompt [P, H] goes through all layers without text. The result is a
   `PrefixKV`: the keys and values of each layer, and the last virtual token's output, which predicts the first token of
   each row. Its autograd graph is kept for phase 3.

2. Row pass, once per micro-batch (`rows_forward`). The rows are concatenated to one stream of S tokens, which goes
   through all layers as [S, H]. Each row attends to the prompt's keys and values and, causally, to itself. The loss is
   computed only at the n positions whose next token is a target. The rows use detached copies of the prompt's keys and
   values, so the backward pass of a micro-batch ends at these copies: it adds to their gradients and frees the
   micro-batch's activations. The base is frozen and gets no gradient.

3. Prompt backward, once per window. The accumulated gradients of the copies are backpropagated through the graph of
   phase 1. The result is ∂loss/∂prompt [P, H].
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from softprompt.data.collate import Packed, collate_packed, cut_by_tokens, has_targets
from softprompt.data.tokenization import Example
from softprompt.engines.head import Head
from softprompt.engines.microbatch_engine import LossInputs


class PrefixKV(NamedTuple):
    """The result of the prompt pass.

    Attributes:
        layers: The prompt's keys and values in all layers. The first dimension of each tensor is P; the other
            dimensions and the number of tensors per layer depend on the schedule.
        last_hidden: The last hidden state of the last virtual token [1, H], which predicts a row's first token; [0, H]
            without a prompt.
    """

    layers: list[Tensor]
    last_hidden: Tensor


class PrefixSchedule:
    """The `Schedule` that the module's docstring describes. Micro-batches go through the base one after the other. A
    subclass implements phases 1 and 2 for a particular kind of base."""

    kind = "packed"
    attn_implementation = "sdpa"
    device: torch.device
    compute_dtype: torch.dtype
    gradient_checkpointing: bool
    head: Head

    def run_prompt(self, prompt: Tensor | None) -> PrefixKV:
        """Phase 1: run the virtual tokens [P, H] through all layers; None means no prompt."""
        raise NotImplementedError

    def rows_forward(self, prefix: PrefixKV, batch: Packed) -> LossInputs:
        """Phase 2: run a micro-batch behind the prompt, up to the input of the head."""
        raise NotImplementedError

    def cut(self, rows: Sequence[Example], tokens: int, P: int) -> Iterator[list[Example]]:
        """See `Schedule.cut`."""
        return cut_by_tokens(rows, tokens)

    def collate(self, rows: Sequence[Example]) -> Packed:
        """See `Schedule.collate`."""
        return collate_packed(rows).to(self.device)

    def accumulate(self, prompt: Tensor, batches: Iterable[Packed], grad_scale: Tensor | float) -> Tensor:
        """See `Schedule.accumulate`."""
        prefix = self.run_prompt(prompt)
        outputs = [*prefix.layers, prefix.last_hidden]
        # The rows' gradients accumulate here, in at least fp32: keys and values may be in half precision.
        leaves = [t.detach().to(torch.promote_types(t.dtype, torch.float32)).requires_grad_() for t in outputs]
        total = torch.zeros((), device=prompt.device, dtype=torch.float64)
        for batch in filter(has_targets, batches):
            loss = self.head.loss(*self.rows_forward(PrefixKV(leaves[:-1], leaves[-1]), batch))
            (loss * grad_scale).backward()
            total += loss.detach()
        gradients = (torch.zeros_like(t) if t.grad is None else t.grad for t in leaves)
        torch.autograd.backward(outputs, [g.to(t.dtype) for g, t in zip(gradients, outputs, strict=True)])
        return total

    def iter_loss_inputs(self, prompt: Tensor | None, batches: Iterable[Packed]) -> Iterator[LossInputs]:
        """See `Schedule.iter_loss_inputs`."""
        prefix = self.run_prompt(prompt)
        return (self.rows_forward(prefix, batch) for batch in batches)

    def largest_microbatch(self, window: Sequence[Example], tokens_per_microbatch: int) -> int:
        """Return the number of tokens of the largest micro-batch of a window; 0 on a rank without rows."""
        lengths = [len(row.input_ids) for row in window]
        return max(max(lengths, default=0), min(sum(lengths), tokens_per_microbatch))

    def __str__(self) -> str:
        return ""
