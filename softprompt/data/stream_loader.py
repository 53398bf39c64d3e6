"""The loader of streamed rows, and its shuffle buffer. For a given seed, every version of Python and of this package
shuffles in the same order."""

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
from softprompt.data.encoding import Encoded
from softprompt.data.stream_sources import Raw, Source
from softprompt.data.tokenization import CHUNK, count_targets, describe_losses
from softprompt.utils.errors import DataError

T = TypeVar("T")


class ShuffleBuffer(Generic[T]):
    """Shuffles a stream through a buffer of `size` items.

    Once the buffer is full, each new item replaces a random item of the buffer, which is yielded. At the end of the
    stream, the remaining items are yielded in random order. This is the buffer that the documentation of
    `datasets.IterableDataset.shuffle` describes (the implementation in datasets 5.2 differs from it). The order depends
    only on the size, the seed, the epoch and the number of items, so it can be replayed without reading the items.

    `random.random()` is used because it is the only method whose sequence for a seed Python guarantees.
    """

    def __init__(self, size: int, seed: int, epoch: int):
        self.size = size
        self.held: list[T] = []
        self.random = random.Random(f"{seed} {epoch}")

    def through(self, items: Iterator[T]) -> Iterator[T]:
        """Yield the items in shuffled order, including those that the buffer already holds."""
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


PREFETCHED = 2  # how many windows a thread prepares in advance
Encode = Callable[[Sequence[Raw]], list[Encoded]]


@dataclass(frozen=True)
class StreamPosition:
    """A position in a stream: `epoch` passes are complete, and `taken` rows of the current pass have left the shuffle
    buffer.

    `length` is the number of rows of a pass; None until the source's end has been reached. The other counts are those
    of `Tokenized`, over all rows since the beginning of the run.
    """

    epoch: int = 0
    taken: int = 0
    length: int | None = None
    rows: int = 0
    cut: int = 0
    without_target: int = 0
    empty_answers: int = 0

    def after(self, row: Encoded) -> "StreamPosition":
        """Return the position after one more row has left the shuffle buffer."""
        return StreamPosition(
            self.epoch,
            self.taken + 1,
            self.length,
            self.rows + 1,
            self.cut + row.cut,
            self.without_target + (not count_targets(row.example)),
            self.empty_answers + row.empty,
        )


class StreamLoader:
    """Yields the rows of a source through a shuffle buffer, in a different order in each pass.

    Rows are tokenized (`encode`) in a thread, in advance of the step that needs them. The order can be replayed with
    row numbers instead of rows (see `ShuffleBuffer`), so a resumed run reads only the rows that the buffer held and
    those after them.
    """

    places = "{}"

    def __init__(
        self, source: Source, encode: Encode, args: TrainingArguments, rows_per_step: int, buffer_size: int, name: str
    ):
        """`encode` tokenizes raw rows and may raise DataError; `name` names the source in error messages."""
        self.source, self.encode, self.args, self.name = source, encode, args, name
        self.rows_per_step, self.buffer_size = rows_per_step, buffer_size
        self.length = source.rows if source.counted else None  # otherwise, it is set when the source has ended

    @property
    def rows(self) -> int | None:
        return self.source.rows

    @property
    def total_steps(self) -> int:
        assert self.rows is not None or self.args.max_steps > 0, "_open requires --max_steps"
        return total_steps(self.rows or 0, self.args, self.rows_per_step)

    def is_over(self, step: int, position: Position) -> bool:
        return step >= self.total_steps or (
            self.args.max_steps <= 0 and self._passes(StreamPosition(**position)) >= self.args.num_train_epochs
        )

    def _passes(self, at: StreamPosition) -> float:
        """Return the number of passes that are done. A part of a pass counts only if rows without a target were left
        out; otherwise `total_steps` is exact."""
        return at.epoch + (at.taken / self.rows if at.without_target and self.rows else 0)

    def describe_rows_read(self, position: Position) -> str:
        at = StreamPosition(**position)
        found = describe_losses(at.cut, at.without_target, at.empty_answers)
        return "; ".join([f"Training: {at.rows:,} rows were read", *found])

    def windows(self, step: int = 0, position: Position = BEGINNING) -> Generator[Window, None, None]:
        return prefetch(self._windows(StreamPosition(**position)), PREFETCHED)

    def _windows(self, at: StreamPosition) -> Iterator[Window]:
        while True:
            window: list[tuple[str, Encoded]] = []
            full, fault = at, None
            try:
                for place, row in self._encoded(self._drawn(at)):
                    at = self._marked(at.after(row))
                    if not count_targets(row.example):
                        continue
                    if len(window) == self.rows_per_step:  # another row follows, so this window does not end the epoch
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

    def _marked(self, at: StreamPosition) -> StreamPosition:
        """Return the position with the length of a pass, if the source had ended before this row was drawn from the
        buffer. Replaying the order needs that length."""
        drained = self.length is not None and at.taken + self.buffer_size > self.length
        return dataclasses.replace(at, length=self.length) if drained and at.length is None else at

    def _window(self, rows: Sequence[tuple[str, Encoded]], at: StreamPosition, ends_epoch: bool) -> Window:
        """Make a window. If the length of a pass is unknown, `Window.epoch` counts only whole passes."""
        length = self.rows or (at.length if at.epoch else None)
        places = [place for place, _ in rows]
        epoch = at.epoch + (min(1, at.taken / length) if length else 0)
        return Window([row.example for _, row in rows], places, epoch, ends_epoch, dataclasses.asdict(at))

    def _after_all(self, at: StreamPosition, kept: bool) -> StreamPosition:
        """Return the position after a pass; `kept` says whether any row of the pass has a target."""
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
            except DataError:  # encode row by row, so that the rows before the faulty one are used
                encoded = (self.encode([raw])[0] for raw in chunk)
            for (place, _), row in zip(chunk, encoded, strict=True):
                yield place, row

    def _drawn(self, at: StreamPosition) -> Iterator[Raw]:
        """Return an iterator over the rows of a pass in shuffled order, starting after the `taken` rows that have left
        the buffer."""
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
        """Yield the source's rows, starting with row `first`. At their end, store the number of rows in `length`."""
        read = first
        for row in self.source.read(first):
            yield row
            read += 1
        self.length = read

    def _changed(self) -> DataError:
        return DataError(f"{self.name}: does not have as many rows as before; it must not change while a run reads it")


def prefetch(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """Yield `items` while a thread computes up to `depth` of them in advance. No item may be None."""
    pool = ThreadPoolExecutor(1, "rows")
    try:
        waiting = deque(pool.submit(next, items, None) for _ in range(depth))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(next, items, None))
            yield item
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
