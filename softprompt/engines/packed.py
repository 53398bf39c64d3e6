"""The packed engine: a window of rows becomes micro-batches of packed ones, which a schedule takes through the base."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from softprompt.data.collate import Packed, collate_packed, cut_by_tokens, has_targets
from softprompt.data.tokenization import IGNORE, Example, count_targets
from softprompt.engines.bloom import Predictions, Prefix, predictions, run_prompt, run_rows
from softprompt.engines.linear_cross_entropy import BLOCK_ELEMENTS, projected_cross_entropy, projected_losses
from softprompt.engines.memory_estimate import bytes_per_token
from softprompt.models.bloom_weights import Weights
from softprompt.prompt.soft_prompt import PromptEmbedding
from softprompt.utils.errors import TrainingError
from softprompt.utils.out_of_memory import is_out_of_memory

T = TypeVar("T")


class Schedule(Protocol):
    """In which order the micro-batches of a window and the blocks of the base meet."""

    def accumulate(self, prompt: Tensor, batches: Iterator[Packed], grad_scale: Tensor | float) -> Tensor:
        """Send grad_scale · ∂(summed loss)/∂prompt backward from prompt [P, H], when all else is done; returns the
        summed loss, a detached fp64 scalar."""
        ...

    def predictions(self, prompt: Tensor, batches: Iterator[Packed]) -> Iterator[Predictions]:
        """Of each micro-batch, without a gradient; prompt [P, H], and P = 0 is none."""
        ...

    def kept_bytes(self, P: int, tokens: int, tokens_at_once: int) -> int:
        """What the backward pass of a window keeps."""
        ...


class RowMajor:
    """One micro-batch after the other, each through all blocks: for weights that are at hand."""

    def __init__(self, weights: Weights, gradient_checkpointing: bool = False):
        self.weights, self.gradient_checkpointing = weights, gradient_checkpointing

    def accumulate(self, prompt: Tensor, batches: Iterator[Packed], grad_scale: Tensor | float) -> Tensor:
        prefix = run_prompt(self.weights, prompt)
        made = [*prefix.layers, prefix.last]
        seen = [t.detach().requires_grad_() for t in made]  # where rows leave their gradients
        total = torch.zeros((), device=prompt.device, dtype=torch.float64)
        for batch in filter(has_targets, batches):
            loss = run_rows(self.weights, Prefix(seen[:-1], seen[-1]), batch, self.gradient_checkpointing)
            (loss * grad_scale).backward()
            total += loss.detach()
        torch.autograd.backward(made, [torch.zeros_like(t) if t.grad is None else t.grad for t in seen])
        return total

    def predictions(self, prompt: Tensor, batches: Iterator[Packed]) -> Iterator[Predictions]:
        prefix = run_prompt(self.weights, prompt)
        return (predictions(self.weights, prefix, batch) for batch in batches)

    def __str__(self) -> str:
        return ""

    def kept_bytes(self, P: int, tokens: int, tokens_at_once: int) -> int:
        shape, dtype = self.weights.shape, self.weights.head.dtype
        rows = tokens_at_once * bytes_per_token(shape, dtype, self.gradient_checkpointing)
        return rows + P * bytes_per_token(shape, dtype)


class PackedEngine:
    """The engine for BLOOM: a window is cut into micro-batches of `tokens_per_microbatch` real tokens."""

    def __init__(
        self,
        weights: Weights,
        tokens_per_microbatch: int,
        gradient_checkpointing: bool = False,
        schedule: Schedule | None = None,
    ):
        self.weights, self.tokens_per_microbatch = weights, tokens_per_microbatch
        self.gradient_checkpointing = gradient_checkpointing
        self.schedule = schedule or RowMajor(weights, gradient_checkpointing)
        self.compute_dtype, self.device = weights.head.dtype, weights.head.device

    def accumulate(
        self, prompt: PromptEmbedding, window: Sequence[Example], grad_scale: Tensor | float
    ) -> tuple[Tensor, int]:
        total = self._in_finer_cuts(
            lambda: self.schedule.accumulate(prompt(), self._micro_batches(window), grad_scale), window
        )
        return total, sum(map(count_targets, window))

    def evaluate(self, prompt: Tensor | None, rows: Sequence[Example]) -> tuple[Tensor, int]:
        return self._in_finer_cuts(lambda: self._evaluate(prompt, rows), rows)

    def losses(self, prompt: Tensor | None, rows: Sequence[Example]) -> list[float]:
        return self._in_finer_cuts(lambda: self._losses(prompt, rows), rows)

    def state(self) -> dict[str, Any]:
        return {"tokens_per_microbatch": self.tokens_per_microbatch}

    def activation_bytes(self, P: int, window: Sequence[Example]) -> int:
        shape = self.weights.shape
        lengths = [len(e.input_ids) for e in window]  # none on a rank without rows
        longest, tokens = max(lengths, default=0), sum(lengths)
        taken = max(longest, min(tokens, self.tokens_per_microbatch))
        bias = 4 * shape.N * longest * (P + longest)
        blocks = 3 * 4 * min(BLOCK_ELEMENTS[self.device.type], taken * shape.V)
        return self.weights.own_bytes + self.schedule.kept_bytes(P, tokens, taken) + bias + blocks

    def __str__(self) -> str:
        return f"packed engine, {self.tokens_per_microbatch:,} tokens at a time{self.schedule}"

    @torch.no_grad()
    def _evaluate(self, prompt: Tensor | None, rows: Sequence[Example]) -> tuple[Tensor, int]:
        total, targets = torch.zeros((), device=self.device, dtype=torch.float64), 0
        for each in self.schedule.predictions(self._values(prompt), self._micro_batches(rows)):
            total += projected_cross_entropy(*each)
            targets += len(each.targets)
        return total, targets

    @torch.no_grad()
    def _losses(self, prompt: Tensor | None, rows: Sequence[Example]) -> list[float]:
        sums, each = [0.0] * len(rows), self.schedule.predictions(self._values(prompt), self._micro_batches(rows))
        longest_first = sorted(range(len(rows)), key=lambda r: len(rows[r].input_ids), reverse=True)
        numbers = iter(longest_first)  # the order in which cut_by_tokens hands rows out
        for some, found in zip(cut_by_tokens(rows, self.tokens_per_microbatch), each, strict=True):
            here = [next(numbers) for _ in some]
            first = [r for r in here if rows[r].labels[0] != IGNORE and prompt is not None]
            later = [r for r in here for label in rows[r].labels[1:] if label != IGNORE]
            for r, loss in zip([*first, *later], projected_losses(*found).tolist(), strict=True):
                sums[r] += loss
        return sums

    def _values(self, prompt: Tensor | None) -> Tensor:
        """[P, H]; without a prompt [0, H]."""
        none = torch.zeros(0, dtype=torch.int64, device=self.device)
        return self.weights.embed(none) if prompt is None else prompt.to(self.device)

    def _micro_batches(self, window: Sequence[Example]) -> Iterator[Packed]:
        for rows in cut_by_tokens(window, self.tokens_per_microbatch):
            yield collate_packed(rows).to(self.device)

    def _in_finer_cuts(self, run: Callable[[], T], rows: Sequence[Example]) -> T:
        """The rows once more in smaller micro-batches, for as long as the device's memory does not hold them; the
        prompt's gradient is only touched at a window's end, so nothing of the failed try stays."""
        while True:
            try:
                return run()
            except RuntimeError as error:  # on the CPU, running out of memory has no type of its own
                longest = max((len(row.input_ids) for row in rows), default=0)
                if not is_out_of_memory(error):
                    raise
                if self.tokens_per_microbatch <= longest:
                    raise TrainingError(
                        f"out of memory with one row of {longest:,} tokens at a time; give a smaller --max_length"
                        + ("" if self.gradient_checkpointing else ", or --gradient_checkpointing")
                    ) from None
                self.tokens_per_microbatch = max(longest, self.tokens_per_microbatch // 2)
            torch.cuda.empty_cache()
            tqdm.write(
                f"out of memory: the step is repeated in micro-batches of {self.tokens_per_microbatch:,} tokens, "
                "with the same gradient"
            )
