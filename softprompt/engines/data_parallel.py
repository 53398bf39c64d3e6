"""Data parallelism: each rank computes its share of a window's rows, and the prompt's gradient is summed over ranks."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from softprompt.data.tokenization import Example, count_targets
from softprompt.distributed.process_group import World
from softprompt.distributed.row_assignment import assign_rows, select
from softprompt.engines.base import Engine, OnRows, nothing
from softprompt.prompt.soft_prompt import PromptEmbedding
from softprompt.utils.errors import EXIT_CODES


class DataParallelEngine:
    """The `Engine` of one rank; every rank must call its methods with the same arguments.

    Rows are assigned by length, so that ranks get equal work rather than equal numbers of rows. One all-reduce per step
    sums the prompt's gradient [P, H] and the loss, and collects the ranks' stop requests. It is done in fp64, so that
    the order of summation does not change the rounded result.

    Args:
        engine: Computes this rank's rows.
        join: Called after this rank's rows are computed. With a sharded base, it takes part in the other ranks' passes.
    """

    def __init__(self, engine: Engine, world: World, join: Callable[[], None] = lambda: None):
        self.engine, self.world, self.join = engine, world, join
        self.device, self.compute_dtype = engine.device, engine.compute_dtype

    def accumulate(
        self, prompt: PromptEmbedding, window: Sequence[Example], grad_scale: Tensor | float
    ) -> tuple[Tensor, int]:
        before, prompt.weight.grad = prompt.weight.grad, None
        loss, _ = self.engine.accumulate(prompt, self._mine(window), grad_scale)
        self.join()
        gradient = torch.zeros_like(prompt.weight) if prompt.weight.grad is None else prompt.weight.grad
        asked = self.world.requested_exit_code()
        requests = torch.tensor([float(asked == code) for code in EXIT_CODES], dtype=torch.float64, device=self.device)
        sums = self.world.all_reduce(torch.cat([gradient.flatten().double(), loss.double()[None], requests]))
        total, loss, requests = sums.split([gradient.numel(), 1, len(EXIT_CODES)])
        prompt.weight.grad = total.view_as(gradient).to(gradient.dtype) + (0 if before is None else before)
        self.world.agreed_exit_code = next((c for c, n in zip(EXIT_CODES, requests.tolist(), strict=True) if n), None)
        return loss[0], sum(map(count_targets, window))

    def evaluate(self, prompt: Tensor | None, rows: Sequence[Example], on_rows: OnRows = nothing) -> tuple[Tensor, int]:
        mine = self._mine(rows)
        loss, targets = self.engine.evaluate(prompt, mine, _of_all(on_rows, len(mine), len(rows)))
        self.join()
        count = torch.tensor([float(targets)], dtype=torch.float64, device=self.device)
        sums = self.world.all_reduce(torch.cat([loss.double()[None], count]))
        return sums[0], int(sums[1])

    def row_losses(self, prompt: Tensor | None, rows: Sequence[Example], on_rows: OnRows = nothing) -> list[float]:
        shares = assign_rows([len(row.input_ids) for row in rows], self.world.size)
        share = select(rows, shares[self.world.rank])
        mine = self.engine.row_losses(prompt, share, _of_all(on_rows, len(share), len(rows)))
        self.join()
        by_row = dict(zip(chain(*shares), chain(*self.world.all_gather(mine)), strict=True))
        return [by_row[row] for row in range(len(rows))]

    def state_dict(self) -> dict[str, Any]:
        return self.engine.state_dict()

    def activation_bytes(self, P: int, window: Sequence[Example]) -> int:
        return self.engine.activation_bytes(P, self._mine(window))

    def __str__(self) -> str:
        return f"{self.engine}, {self.world.size} processes"

    def _mine(self, rows: Sequence[Example]) -> list[Example]:
        return select(rows, assign_rows([len(row.input_ids) for row in rows], self.world.size)[self.world.rank])


def _of_all(on_rows: OnRows, mine: int, rows: int) -> OnRows:
    """Return an `OnRows` for this rank's rows, which assumes that the other ranks are as far as this one."""
    return lambda done: on_rows(rows * done // mine)
