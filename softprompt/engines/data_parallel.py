"""An engine that shares the rows of each step among the ranks of a run and sums the prompt's gradient."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from softprompt.data.tokenization import Example, count_targets
from softprompt.distributed.process_group import World
from softprompt.distributed.row_assignment import assign_rows, select
from softprompt.engines.base import Engine
from softprompt.prompt.soft_prompt import PromptEmbedding
from softprompt.utils.errors import EXIT_CODES


class DataParallelEngine:
    """Rows are dealt by length, so that ranks have equal work and not equal counts. One all-reduce a step takes the
    prompt's gradient [P, H], the loss, and the ranks' wishes to stop; in fp64, so that the sum does not depend on who
    adds first. `rest` is called when this rank's rows are done: over a sharded base others may still need it."""

    def __init__(self, engine: Engine, world: World, rest: Callable[[], None] = lambda: None):
        self.engine, self.world, self.rest = engine, world, rest
        self.device, self.compute_dtype = engine.device, engine.compute_dtype

    def accumulate(
        self, prompt: PromptEmbedding, window: Sequence[Example], grad_scale: Tensor | float
    ) -> tuple[Tensor, int]:
        before, prompt.weight.grad = prompt.weight.grad, None
        loss, _ = self.engine.accumulate(prompt, self._mine(window), grad_scale)
        self.rest()
        gradient = torch.zeros_like(prompt.weight) if prompt.weight.grad is None else prompt.weight.grad
        wish = self.world.requested_exit_code()
        wishes = torch.tensor([float(wish == code) for code in EXIT_CODES], dtype=torch.float64, device=self.device)
        sums = self.world.all_reduce(torch.cat([gradient.flatten().double(), loss.double()[None], wishes]))
        total, loss, wishes = sums.split([gradient.numel(), 1, len(EXIT_CODES)])
        prompt.weight.grad = total.view_as(gradient).to(gradient.dtype) + (0 if before is None else before)
        self.world.agreed_exit_code = next((c for c, n in zip(EXIT_CODES, wishes.tolist(), strict=True) if n), None)
        return loss[0], sum(map(count_targets, window))

    def evaluate(self, prompt: Tensor | None, rows: Sequence[Example]) -> tuple[Tensor, int]:
        loss, targets = self.engine.evaluate(prompt, self._mine(rows))
        self.rest()
        count = torch.tensor([float(targets)], dtype=torch.float64, device=self.device)
        sums = self.world.all_reduce(torch.cat([loss.double()[None], count]))
        return sums[0], int(sums[1])

    def losses(self, prompt: Tensor | None, rows: Sequence[Example]) -> list[float]:
        hands = assign_rows([len(row.input_ids) for row in rows], self.world.size)
        mine = self.engine.losses(prompt, select(rows, hands[self.world.rank]))
        self.rest()
        by_row = dict(zip(chain(*hands), chain(*self.world.all_gather(mine)), strict=True))
        return [by_row[row] for row in range(len(rows))]

    def state(self) -> dict[str, Any]:
        return self.engine.state()

    def activation_bytes(self, P: int, window: Sequence[Example]) -> int:
        return self.engine.activation_bytes(P, self._mine(window))

    def __str__(self) -> str:
        return f"{self.engine}, {self.world.size} processes"

    def _mine(self, rows: Sequence[Example]) -> list[Example]:
        return select(rows, assign_rows([len(row.input_ids) for row in rows], self.world.size)[self.world.rank])
