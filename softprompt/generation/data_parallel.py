"""A generator that shares its requests among the ranks of a run."""

from collections.abc import Callable, Iterator, Sequence

from softprompt.distributed.process_group import World
from softprompt.distributed.row_assignment import assign_rows, select
from softprompt.generation.hf_generate import Generator
from softprompt.generation.requests import Request
from softprompt.generation.sampling import OnToken


class DataParallelGenerator:
    """Each rank answers its share; all ranks return all answers once all have finished. `rest` is explained in
    `DataParallelEngine`."""

    def __init__(self, generator: Generator, world: World, rest: Callable[[], None] = lambda: None):
        self.generator, self.world, self.rest = generator, world, rest

    def __str__(self) -> str:
        return str(self.generator)

    def generate(
        self, requests: Sequence[Request], batch_size: int = 8, on_token: OnToken | None = None
    ) -> Iterator[tuple[int, list[int]]]:
        mine = assign_rows([len(request.ids) for request in requests], self.world.size)[self.world.rank]
        answers = self.generator.generate(select(requests, mine), batch_size, on_token)
        made = [(mine[number], answer) for number, answer in answers]
        self.rest()
        yield from sorted((number, answer) for some in self.world.all_gather(made) for number, answer in some)
