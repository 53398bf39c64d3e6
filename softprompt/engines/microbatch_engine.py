"""The engine: it cuts a window of rows into micro-batches, and a schedule runs them through the base.

The engine does not depend on the model. It sums losses, and retries with smaller micro-batches when memory runs out. A
`Schedule` runs micro-batches behind a prompt through a particular kind of base. The packed schedules concatenate rows
without padding: `bloom_schedule.MicrobatchMajor` and `layer_major.LayerMajor` for BLOOM,
`decoder_schedule.DecoderSchedule` for other decoders. `padded_schedule.PaddedSchedule` pads rows and runs the base's
own forward.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from softprompt.data.tokenization import IGNORE, Example, count_targets
from softprompt.engines.base import OnRows, nothing
from softprompt.engines.head import Head
from softprompt.prompt.soft_prompt import PromptEmbedding
from softprompt.utils.errors import OutOfMemoryError
from softprompt.utils.out_of_memory import is_out_of_memory
from softprompt.utils.progress import say

T = TypeVar("T")
MicrobatchT = TypeVar("MicrobatchT")


class LossInputs(NamedTuple):
    """The inputs of a micro-batch's loss. The f targets that are the first token of their row come first, then the n
    other targets, row by row. Without a prompt f = 0, because no position predicts a first token.

    Attributes:
        hidden: [f + n, H], the final hidden states that predict the targets.
        targets: [f + n] int64, token ids.
    """

    hidden: Tensor
    targets: Tensor


class Schedule(Protocol[MicrobatchT]):
    """Runs the micro-batches of a window through a base. It determines their layout, in which order they go through the
    base's layers, and what is kept for the backward pass.

    Attributes:
        kind: "packed" or "padded".
        attn_implementation: What computes attention: "sdpa", "varlen" or "flex_attention"; "auto" if the base decides.
        device: The device that computes.
        compute_dtype: The dtype of matrix products.
        gradient_checkpointing: Whether the activations within layers are recomputed in the backward pass.
        head: Computes losses from `LossInputs`.
    """

    kind: str
    attn_implementation: str
    device: torch.device
    compute_dtype: torch.dtype
    gradient_checkpointing: bool
    head: Head

    def cut(self, rows: Sequence[Example], tokens: int, P: int) -> Iterator[list[Example]]:
        """Cut rows into micro-batches, longest rows first. A micro-batch has at most `tokens` tokens, or one row. P is
        the number of virtual tokens."""
        ...

    def collate(self, rows: Sequence[Example]) -> MicrobatchT:
        """Convert rows to one micro-batch on the device."""
        ...

    def accumulate(self, prompt: Tensor, batches: Iterable[MicrobatchT], grad_scale: Tensor | float) -> Tensor:
        """Compute the summed loss of a window, and backpropagate grad_scale · loss to the prompt.

        The gradient reaches the graph of `prompt` only once, after all micro-batches. So a window that runs out of
        memory before that can be repeated.

        Args:
            prompt: [P, H], part of an autograd graph.
            batches: The window's micro-batches.
        Returns:
            The summed loss, a detached fp64 scalar.
        """
        ...

    def iter_loss_inputs(self, prompt: Tensor | None, batches: Iterable[MicrobatchT]) -> Iterator[LossInputs]:
        """Yield the loss inputs of each micro-batch, in order. The caller disables gradients. `prompt` is [P, H], or
        None for the bare base."""
        ...

    def activation_bytes(self, P: int, window: Sequence[Example], tokens_per_microbatch: int) -> int:
        """Estimate the bytes that a step over `window` with P virtual tokens takes in addition to the base."""
        ...


class MicrobatchEngine(Generic[MicrobatchT]):
    """The `Engine` of a schedule. It cuts a window into micro-batches of at most `tokens_per_microbatch` tokens; a
    longer row is a micro-batch by itself. When memory runs out, it halves the limit and repeats the window."""

    def __init__(self, schedule: Schedule[MicrobatchT], tokens_per_microbatch: int):
        self.schedule, self.tokens_per_microbatch = schedule, tokens_per_microbatch
        self.compute_dtype, self.device = schedule.compute_dtype, schedule.device

    def accumulate(
        self, prompt: PromptEmbedding, window: Sequence[Example], grad_scale: Tensor | float
    ) -> tuple[Tensor, int]:
        def run() -> Tensor:
            values = prompt()
            return self.schedule.accumulate(values, map(self.schedule.collate, self._cut(window, values)), grad_scale)

        return self._retry_when_out_of_memory(run, window), sum(map(count_targets, window))

    def evaluate(self, prompt: Tensor | None, rows: Sequence[Example], on_rows: OnRows = nothing) -> tuple[Tensor, int]:
        return self._retry_when_out_of_memory(lambda: self._evaluate(prompt, rows, on_rows), rows)

    def row_losses(self, prompt: Tensor | None, rows: Sequence[Example], on_rows: OnRows = nothing) -> list[float]:
        return self._retry_when_out_of_memory(lambda: self._row_losses(prompt, rows, on_rows), rows)

    def state_dict(self) -> dict[str, Any]:
        cut = {"engine": self.schedule.kind, "tokens_per_microbatch": self.tokens_per_microbatch}
        return {**cut, "attn_implementation": self.schedule.attn_implementation}

    def activation_bytes(self, P: int, window: Sequence[Example]) -> int:
        return self.schedule.activation_bytes(P, window, self.tokens_per_microbatch)

    def __str__(self) -> str:
        kernel = self.schedule.attn_implementation
        of_kernel = "" if kernel in ("sdpa", "auto") else f", {kernel} attention"
        return f"{self.schedule.kind} engine, {self.tokens_per_microbatch:,} tokens at a time{of_kernel}{self.schedule}"

    @torch.no_grad()
    def _evaluate(self, prompt: Tensor | None, rows: Sequence[Example], on_rows: OnRows) -> tuple[Tensor, int]:
        total, targets = torch.zeros((), device=self.device, dtype=torch.float64), 0
        for _, inputs in self._loss_inputs(prompt, rows, on_rows):
            total += self.schedule.head.loss(*inputs)
            targets += len(inputs.targets)
        return total, targets

    @torch.no_grad()
    def _row_losses(self, prompt: Tensor | None, rows: Sequence[Example], on_rows: OnRows) -> list[float]:
        sums = [0.0] * len(rows)
        longest_first = sorted(range(len(rows)), key=lambda r: len(rows[r].input_ids), reverse=True)
        order = iter(longest_first)  # `Schedule.cut` yields the rows in this order
        for part, inputs in self._loss_inputs(prompt, rows, on_rows):
            here = [next(order) for _ in part]
            first = [r for r in here if rows[r].labels[0] != IGNORE and prompt is not None]
            later = [r for r in here for label in rows[r].labels[1:] if label != IGNORE]
            for r, loss in zip([*first, *later], self.schedule.head.losses(*inputs).tolist(), strict=True):
                sums[r] += loss
        return sums

    def _loss_inputs(
        self, prompt: Tensor | None, rows: Sequence[Example], on_rows: OnRows
    ) -> Iterator[tuple[Sequence[Example], LossInputs]]:
        """Yield each micro-batch's rows and loss inputs."""
        prompt, done = None if prompt is None else prompt.to(self.device), 0
        parts = list(self._cut(rows, prompt))
        inputs = self.schedule.iter_loss_inputs(prompt, map(self.schedule.collate, parts))
        for part, of_part in zip(parts, inputs, strict=True):
            yield part, of_part
            done += len(part)
            on_rows(done)

    def _cut(self, rows: Sequence[Example], prompt: Tensor | None) -> Iterator[Sequence[Example]]:
        P = 0 if prompt is None else len(prompt)
        return self.schedule.cut(rows, self.tokens_per_microbatch, P)

    def _retry_when_out_of_memory(self, run: Callable[[], T], rows: Sequence[Example]) -> T:
        """Call `run` until it does not run out of memory; halve `tokens_per_microbatch` before each repetition. The
        prompt's gradient is changed only at the end of a window, so a failed attempt does not change it.

        Args:
            rows: The rows that `run` computes.

        Raises:
            OutOfMemoryError: Even micro-batches of one row do not fit in memory.
        """
        while True:
            try:
                return run()
            except RuntimeError as error:  # running out of memory on the CPU raises a plain RuntimeError
                longest = max((len(row.input_ids) for row in rows), default=0)
                if not is_out_of_memory(error):
                    raise
                if self.tokens_per_microbatch <= longest:
                    raise OutOfMemoryError(
                        f"out of memory with one row of {longest:,} tokens at a time; give a smaller --max_length"
                        + ("" if self.schedule.gradient_checkpointing else ", or --gradient_checkpointing")
                    ) from None
                self.tokens_per_microbatch = max(longest, self.tokens_per_microbatch // 2)
            torch.cuda.empty_cache()
            say(
                f"out of memory: computing the rows again in micro-batches of {self.tokens_per_microbatch:,} tokens; "
                "the result stays the same"
            )
