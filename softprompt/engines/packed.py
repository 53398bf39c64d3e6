"""The packed engine: rows are packed without padding into micro-batches, which a schedule runs through the base.

The engine does not depend on the model: it cuts a window into micro-batches, sums losses, and retries with smaller
micro-batches when memory runs out. A `Schedule` computes packed rows behind a prompt with a particular kind of base;
those for BLOOM are `bloom_schedule.MicrobatchMajor` and `layer_major.LayerMajor`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from softprompt.data.collate import Packed, collate_packed, cut_by_tokens
from softprompt.data.tokenization import IGNORE, Example, count_targets
from softprompt.engines.linear_cross_entropy import LossInputs, projected_cross_entropy, projected_losses
from softprompt.prompt.soft_prompt import PromptEmbedding
from softprompt.utils.errors import TrainingError
from softprompt.utils.out_of_memory import is_out_of_memory

T = TypeVar("T")


class Schedule(Protocol):
    """How the micro-batches of a window are computed with a base: in which order they pass through its blocks, and what
    is kept for the backward pass.

    Attributes:
        device: Where the base computes.
        compute_dtype: The dtype of its matrix products.
        gradient_checkpointing: Whether blocks are recomputed in the backward pass.
    """

    device: torch.device
    compute_dtype: torch.dtype
    gradient_checkpointing: bool

    def accumulate(self, prompt: Tensor, batches: Iterable[Packed], grad_scale: Tensor | float) -> Tensor:
        """Compute the summed loss of a window and backpropagate grad_scale · loss to the prompt.

        The prompt's own gradient is changed only once, after all micro-batches; so a window that ran out of memory can
        be repeated.

        Args:
            prompt: [P, H], part of an autograd graph.
            batches: The window's micro-batches.
        Returns:
            The summed loss, a detached fp64 scalar.
        """
        ...

    def iter_loss_inputs(self, prompt: Tensor | None, batches: Iterable[Packed]) -> Iterator[LossInputs]:
        """Yield the loss inputs of each micro-batch, in order and without a gradient. `prompt` is [P, H]; None is the
        bare base."""
        ...

    def activation_bytes(self, P: int, longest: int, tokens: int, tokens_per_microbatch: int) -> int:
        """Estimate the memory that a window takes in addition to the base.

        Args:
            P: Number of virtual tokens.
            longest: Number of tokens of the window's longest row.
            tokens: Number of tokens of the window.
            tokens_per_microbatch: Number of tokens of the window's largest micro-batch.
        """
        ...


class PackedEngine:
    """The `Engine` for packed rows. A window is cut into micro-batches of at most `tokens_per_microbatch` tokens; a row
    that is longer is a micro-batch by itself. When memory runs out, the limit is halved and the window is repeated."""

    def __init__(self, schedule: Schedule, tokens_per_microbatch: int):
        self.schedule, self.tokens_per_microbatch = schedule, tokens_per_microbatch
        self.compute_dtype, self.device = schedule.compute_dtype, schedule.device

    def accumulate(
        self, prompt: PromptEmbedding, window: Sequence[Example], grad_scale: Tensor | float
    ) -> tuple[Tensor, int]:
        total = self._retry_when_out_of_memory(
            lambda: self.schedule.accumulate(prompt(), self._micro_batches(window), grad_scale), window
        )
        return total, sum(map(count_targets, window))

    def evaluate(self, prompt: Tensor | None, rows: Sequence[Example]) -> tuple[Tensor, int]:
        return self._retry_when_out_of_memory(lambda: self._evaluate(prompt, rows), rows)

    def row_losses(self, prompt: Tensor | None, rows: Sequence[Example]) -> list[float]:
        return self._retry_when_out_of_memory(lambda: self._row_losses(prompt, rows), rows)

    def state_dict(self) -> dict[str, Any]:
        return {"tokens_per_microbatch": self.tokens_per_microbatch}

    def activation_bytes(self, P: int, window: Sequence[Example]) -> int:
        lengths = [len(e.input_ids) for e in window]  # empty on a rank without rows
        longest, tokens = max(lengths, default=0), sum(lengths)
        largest = max(longest, min(tokens, self.tokens_per_microbatch))
        return self.schedule.activation_bytes(P, longest, tokens, largest)

    def __str__(self) -> str:
        return f"packed engine, {self.tokens_per_microbatch:,} tokens at a time{self.schedule}"

    @torch.no_grad()
    def _evaluate(self, prompt: Tensor | None, rows: Sequence[Example]) -> tuple[Tensor, int]:
        total, targets = torch.zeros((), device=self.device, dtype=torch.float64), 0
        for inputs in self.schedule.iter_loss_inputs(self._on_device(prompt), self._micro_batches(rows)):
            total += projected_cross_entropy(*inputs)
            targets += len(inputs.targets)
        return total, targets

    @torch.no_grad()
    def _row_losses(self, prompt: Tensor | None, rows: Sequence[Example]) -> list[float]:
        sums = [0.0] * len(rows)
        all_inputs = self.schedule.iter_loss_inputs(self._on_device(prompt), self._micro_batches(rows))
        longest_first = sorted(range(len(rows)), key=lambda r: len(rows[r].input_ids), reverse=True)
        order = iter(longest_first)  # cut_by_tokens puts the rows into micro-batches in this order
        for part, inputs in zip(cut_by_tokens(rows, self.tokens_per_microbatch), all_inputs, strict=True):
            here = [next(order) for _ in part]
            first = [r for r in here if rows[r].labels[0] != IGNORE and prompt is not None]
            later = [r for r in here for label in rows[r].labels[1:] if label != IGNORE]
            for r, loss in zip([*first, *later], projected_losses(*inputs).tolist(), strict=True):
                sums[r] += loss
        return sums

    def _on_device(self, prompt: Tensor | None) -> Tensor | None:
        return None if prompt is None else prompt.to(self.device)

    def _micro_batches(self, window: Sequence[Example]) -> Iterator[Packed]:
        for rows in cut_by_tokens(window, self.tokens_per_microbatch):
            yield collate_packed(rows).to(self.device)

    def _retry_when_out_of_memory(self, run: Callable[[], T], rows: Sequence[Example]) -> T:
        """Call `run` until it does not run out of memory, halving `tokens_per_microbatch` before each repetition. The
        prompt's gradient is changed only at the end of a window, so a failed attempt does not change it.

        Raises:
            TrainingError: Memory does not suffice for micro-batches of one row.
        """
        while True:
            try:
                return run()
            except RuntimeError as error:  # a lack of memory on the CPU raises no more specific type
                longest = max((len(row.input_ids) for row in rows), default=0)
                if not is_out_of_memory(error):
                    raise
                if self.tokens_per_microbatch <= longest:
                    raise TrainingError(
                        f"out of memory with one row of {longest:,} tokens at a time; give a smaller --max_length"
                        + ("" if self.schedule.gradient_checkpointing else ", or --gradient_checkpointing")
                    ) from None
                self.tokens_per_microbatch = max(longest, self.tokens_per_microbatch // 2)
            torch.cuda.empty_cache()
            tqdm.write(
                f"out of memory: the step is repeated in micro-batches of {self.tokens_per_microbatch:,} tokens, "
                "with the same gradient"
            )
