"""An engine and a generator whose work is dealt out to the ranks of a run; to the loop they are any other."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from softprompt.data import Example, count_targets
from softprompt.distributed import World, chosen, deal
from softprompt.generate import Generator
from softprompt.model import Engine
from softprompt.prompt import PromptEmbedding
from softprompt.requests import Request
from softprompt.sampling import OnToken
from softprompt.stopping import EXIT_CODES


class SharedEngine:
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
        wish = self.world.wish()
        wishes = torch.tensor([float(wish == code) for code in EXIT_CODES], dtype=torch.float64, device=self.device)
        sums = self.world.add_up(torch.cat([gradient.flatten().double(), loss.double()[None], wishes]))
        total, loss, wishes = sums.split([gradient.numel(), 1, len(EXIT_CODES)])
        prompt.weight.grad = total.view_as(gradient).to(gradient.dtype) + (0 if before is None else before)
        self.world.agreed = next((c for c, n in zip(EXIT_CODES, wishes.tolist(), strict=True) if n), None)
        return loss[0], sum(map(count_targets, window))

    def evaluate(self, prompt: Tensor | None, rows: Sequence[Example]) -> tuple[Tensor, int]:
        loss, targets = self.engine.evaluate(prompt, self._mine(rows))
        self.rest()
        count = torch.tensor([float(targets)], dtype=torch.float64, device=self.device)
        sums = self.world.add_up(torch.cat([loss.double()[None], count]))
        return sums[0], int(sums[1])

    def losses(self, prompt: Tensor | None, rows: Sequence[Example]) -> list[float]:
        hands = deal([len(row.input_ids) for row in rows], self.world.size)
        mine = self.engine.losses(prompt, chosen(rows, hands[self.world.rank]))
        self.rest()
        by_row = dict(zip(chain(*hands), chain(*self.world.gather(mine)), strict=True))
        return [by_row[row] for row in range(len(rows))]

    def state(self) -> dict[str, Any]:
        return self.engine.state()

    def activation_bytes(self, P: int, window: Sequence[Example]) -> int:
        return self.engine.activation_bytes(P, self._mine(window))

    def __str__(self) -> str:
        return f"{self.engine}, {self.world.size} processes"

    def _mine(self, rows: Sequence[Example]) -> list[Example]:
        return chosen(rows, deal([len(row.input_ids) for row in rows], self.world.size)[self.world.rank])


class SharedGenerator:
    """Each rank answers its requests; all have all answers, when all are finished. `rest` as of `SharedEngine`."""

    def __init__(self, generator: Generator, world: World, rest: Callable[[], None] = lambda: None):
        self.generator, self.world, self.rest = generator, world, rest

    def __str__(self) -> str:
        return str(self.generator)

    def generate(
        self, requests: Sequence[Request], batch_size: int = 8, on_token: OnToken | None = None
    ) -> Iterator[tuple[int, list[int]]]:
        mine = deal([len(request.ids) for request in requests], self.world.size)[self.world.rank]
        answers = self.generator.generate(chosen(requests, mine), batch_size, on_token)
        made = [(mine[number], answer) for number, answer in answers]
        self.rest()
        yield from sorted((number, answer) for some in self.world.gather(made) for number, answer in some)
