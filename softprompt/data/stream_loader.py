"""The shuffle buffer of a stream, the same for a seed in every version of Python and of every library."""

import dataclasses
import itertools
import random
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

from softprompt.config.train_args import TrainingArguments
from softprompt.data.dataloader import BEGINNING, Position, Window, total_steps
from softprompt.data.stream_sources import Raw, Source
from softprompt.data.tokenization import CHUNK, Encoded, count_targets, describe_losses
from softprompt.utils.errors import DataError

T = TypeVar("T")


class ShuffleBuffer(Generic[T]):
    """Holds `size` items of a stream; each further one takes the place of a random one, which goes out; at the stream's
    end the rest goes out at random. It is the buffer that the documentation of `datasets.IterableDataset.shuffle`
    describes (5.2 itself goes by halves). What goes out depends on numbers of items alone, so an order can be followed
    without them.

    `random.random()` is the one draw whose sequence Python promises to keep for a seed.
    """

    def __init__(self, size: int, seed: int, epoch: int):
        self.size = size
        self.held: list[T] = []
        self.random = random.Random(f"{seed} {epoch}")

    def through(self, items: Iterator[T]) -> Iterator[T]:
        """The items in their new order; what is already held goes with them."""
        held, draw, size = self.held, self.random.random, self.size
        for item in items:
            if len(held) < size:
                held.append(item)
                continue
            at = int(draw() * size)
            item, held[at] = held[at], item
            yield item
        while held:
            at = int(draw() * len(held))
            held[at], held[-1] = held[-1], held[at]
            yield held.pop()


AHEAD = 2  # windows that are ready before they are asked for
Encode = Callable[[Sequence[Raw]], list[Encoded]]


@dataclass(frozen=True)
class Mark:
    """Where a stream stands: `epoch` passes are done, and of the next `taken` rows have left the buffer. `length` is
    how many a pass has, once its end was reached; the others count rows since the run began, as in `data.Tokenized`."""

    epoch: int = 0
    taken: int = 0
    length: int | None = None
    rows: int = 0
    cut: int = 0
    without_target: int = 0
    empty_answers: int = 0

    def after(self, row: Encoded) -> "Mark":
        return Mark(
            self.epoch,
            self.taken + 1,
            self.length,
            self.rows + 1,
            self.cut + row.cut,
            self.without_target + (not count_targets(row.example)),
            self.empty_answers + row.empty,
        )


class StreamLoader:
    """Rows of a source through a shuffle buffer of `buffer_size`, in another order in each pass, `encode`d in a thread
    ahead of the step. Where a row stands in a pass follows from seed and pass alone, so a run that goes on follows the
    order on row numbers, and reads only what the buffer held and what comes after."""

    places = "{}"

    def __init__(
        self, source: Source, encode: Encode, args: TrainingArguments, rows_per_step: int, buffer_size: int, name: str
    ):
        """`encode` makes a source's rows into examples, raising DataError; `name` is what messages call the source."""
        self.source, self.encode, self.args, self.name = source, encode, args, name
        self.rows_per_step, self.buffer_size = rows_per_step, buffer_size
        self.length = source.rows if source.counted else None  # of a pass; also once the source has ended

    @property
    def rows(self) -> int | None:
        return self.source.rows

    @property
    def total_steps(self) -> int:
        assert self.rows is not None or self.args.max_steps > 0, "prepare asks for --max_steps"
        return total_steps(self.rows or 0, self.args, self.rows_per_step)

    def is_over(self, step: int, position: Position) -> bool:
        return step >= self.total_steps or (
            self.args.max_steps <= 0 and self._passes(Mark(**position)) >= self.args.num_train_epochs
        )

    def _passes(self, at: Mark) -> float:
        """Passes done; a part of one only counts where rows fell out, else the number of steps says it exactly."""
        return at.epoch + (at.taken / self.rows if at.without_target and self.rows else 0)

    def told(self, position: Position) -> str:
        at = Mark(**position)
        found = describe_losses(at.cut, at.without_target, at.empty_answers)
        return "; ".join([f"Training: {at.rows:,} rows were read", *found])

    def windows(self, step: int = 0, position: Position = BEGINNING) -> Generator[Window, None, None]:
        return ahead(self._windows(Mark(**position)), AHEAD)

    def _windows(self, at: Mark) -> Iterator[Window]:
        while True:
            window: list[tuple[str, Encoded]] = []
            full, fault = at, None
            try:
                for place, row in self._encoded(self._drawn(at)):
                    at = self._marked(at.after(row))
                    if not count_targets(row.example):
                        continue
                    if len(window) == self.rows_per_step:  # one more row follows: this does not end the epoch
                        yield self._window(window, full, ends_epoch=False)
                        window = []
                    window.append((place, row))
                    full = at
            except DataError as error:
                fault = error
            if fault:
                if len(window) == self.rows_per_step:
                    yield self._window(window, full, ends_epoch=False)
                raise fault
            at = self._after_all(at, bool(window))
            yield self._window(window, at, ends_epoch=True)

    def _marked(self, at: Mark) -> Mark:
        """With the length of a pass where the source had ended before the row was drawn: else the order could not be
        followed up to there."""
        drained = self.length is not None and at.taken + self.buffer_size > self.length
        return dataclasses.replace(at, length=self.length) if drained and at.length is None else at

    def _window(self, rows: Sequence[tuple[str, Encoded]], at: Mark, ends_epoch: bool) -> Window:
        """`epoch` counts whole passes alone where no one knows how long one is."""
        length = self.rows or (at.length if at.epoch else None)
        places = [place for place, _ in rows]
        epoch = at.epoch + (min(1, at.taken / length) if length else 0)
        return Window([row.example for _, row in rows], places, epoch, ends_epoch, dataclasses.asdict(at))

    def _after_all(self, at: Mark, kept: bool) -> Mark:
        """The mark at the end of a pass."""
        if self.source.counted and at.taken != self.rows:
            raise self._changed()
        if not kept:
            raise DataError(
                f"{self.name}: no row keeps a target; give a larger --max_length, or --truncation_side input"
            )
        return dataclasses.replace(at, epoch=at.epoch + 1, taken=0, length=at.taken)

    def _encoded(self, rows: Iterator[Raw]) -> Iterator[tuple[str, Encoded]]:
        while chunk := list(islice(rows, CHUNK)):
            try:
                encoded = iter(self.encode(chunk))
            except DataError:  # once more row by row, so that those before the faulty one are trained on
                encoded = (self.encode([raw])[0] for raw in chunk)
            for (place, _), row in zip(chunk, encoded, strict=True):
                yield place, row

    def _drawn(self, at: Mark) -> Iterator[Raw]:
        """Rows of the pass in their order, from the first that was not taken."""
        length = self.rows if self.source.counted else at.length
        numbers = itertools.count() if length is None else iter(range(length))
        order: ShuffleBuffer[Any] = ShuffleBuffer(self.buffer_size, self.args.seed, at.epoch)
        for _ in islice(order.through(numbers), at.taken):
            pass
        unread = next(numbers, length or 0) if at.taken else 0
        first = min(order.held, default=unread)
        rows = self._counted(first)
        wanted = set(order.held)
        held = {number: row for number, row in zip(range(first, unread), rows, strict=False) if number in wanted}
        if len(held) < len(wanted):
            raise self._changed()
        order.held = [held[number] for number in order.held]
        return order.through(rows)

    def _counted(self, first: int) -> Iterator[Raw]:
        """The source's rows from number `first` on; their end is noted."""
        read = first
        for row in self.source.read(first):
            yield row
            read += 1
        self.length = read

    def _changed(self) -> DataError:
        return DataError(f"{self.name}: has not as many rows as before; it must not change while a run reads it")


def ahead(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """The items (none of them None), of which a thread makes `depth` before they are asked for."""
    pool = ThreadPoolExecutor(1, "rows")
    try:
        waiting = deque(pool.submit(next, items, None) for _ in range(depth))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(next, items, None))
            yield item
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
