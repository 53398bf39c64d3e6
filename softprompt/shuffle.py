"""The shuffle buffer of a stream, the same for a seed in every version of Python and of every library."""

import random
from collections.abc import Iterator
from typing import Generic, TypeVar

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
