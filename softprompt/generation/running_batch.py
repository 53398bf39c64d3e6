"""Incremental generation: requests join a batch that is running, and leave it at any step.

A `RunningBatch` holds the requests that are being answered and those that wait in the queue. `Generator.generate`,
which answers a list of requests, and the server, whose requests come at any time, run the same loop over it:

    add      requests enter the queue
    step     one decoding step: requests from the queue take the free slots, and every answer grows by a token
    cancel   `RequestState.cancel`, from any thread: the request leaves at the next step
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from softprompt.generation.requests import OnToken, Request
from softprompt.generation.sampling import RequestState

OnStateToken = Callable[[RequestState, int], None]  # called for each token of an answer


class RunningBatch(Protocol):
    """A batch of answers that are being generated. `bool(batch)` says whether it holds requests; a finished request is
    held until the next step. Only one thread may use a batch."""

    def add(self, requests: Sequence[Request]) -> list[RequestState]:
        """Check requests, put them at the end of the queue, and return their states, with their positions in `requests`
        as indices.

        Raises:
            ConfigError: A text leaves no room for an answer; then no request is added.
        """
        ...

    def step(self, on_token: OnStateToken) -> list[RequestState]:
        """Run the next step. `on_token` is called for each token that is appended to an answer.

        Returns:
            The requests that this step finished.

        Raises:
            TrainingError: A single request does not fit in memory.
        """
        ...

    def __bool__(self) -> bool: ...


class BatchGenerator(ABC):
    """A `Generator` whose answers come from a `RunningBatch`."""

    @abstractmethod
    def new_batch(self, batch_size: int) -> RunningBatch:
        """Return an empty batch that answers at most `batch_size` requests at a time."""

    def generate(
        self, requests: Sequence[Request], batch_size: int = 8, on_token: OnToken | None = None
    ) -> Iterator[tuple[int, list[int]]]:
        """See `Generator.generate`."""
        batch = self.new_batch(max(1, min(batch_size, len(requests))))
        batch.add(requests)
        return _run(batch, on_token)


def _run(batch: RunningBatch, on_token: OnToken | None) -> Iterator[tuple[int, list[int]]]:
    def pass_on(state: RequestState, token: int) -> None:
        if on_token:
            on_token(state.index, token)

    while batch:
        yield from [(state.index, state.answer_ids) for state in batch.step(pass_on)]
