"""A stream's order is the shuffle buffer's, going on anywhere gives the same windows, and memory is bounded."""

import json
import tracemalloc
from itertools import islice

import pytest
from helpers.row_stream import naive_order

from softprompt.config.train_args import TrainingArguments
from softprompt.data.stream_loader import ShuffleBuffer, StreamLoader
from softprompt.data.tokenization import Encoded, Example
from softprompt.utils.errors import DataError


@pytest.mark.parametrize("n", [0, 1, 2, 7, 50])
@pytest.mark.parametrize("size", [1, 2, 7, 49, 50, 1000])
def test_the_shuffle_buffer(n, size):
    for seed, epoch in ((42, 0), (42, 1), (7, 0)):
        out = list(ShuffleBuffer(size, seed, epoch).through(iter(range(n))))
        assert out == naive_order(range(n), size, seed, epoch)
        assert sorted(out) == list(range(n))
        assert all(row < place + size for place, row in enumerate(out))  # none before it was read
        assert size > 1 or out == list(range(n))


def test_rows_are_shuffled_anew_in_each_epoch_and_for_each_seed():
    orders = [list(ShuffleBuffer(100, s, e).through(iter(range(500)))) for s in (1, 2) for e in (0, 1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


class Numbers:
    """A source of numbers that counts what is read of it."""

    def __init__(self, n, known="counted"):
        self.rows = {"counted": n, "unknown": None, "claimed": n + 5}[known]
        self.n, self.counted, self.reads, self.fingerprint = n, known == "counted", 0, ""

    def read(self, first=0):
        for number in range(first, self.n):
            self.reads += 1
            yield f"row {number}", number


def made_of(raws):
    """Every fifth number has no target."""
    examples = [Example([number, 1], [-100, 1 if number % 5 else -100]) for _, number in raws]
    return [Encoded(example, False, False, 1) for example in examples]


def stream_of(source, rows_per_step, size, **settings):
    return StreamLoader(source, made_of, TrainingArguments(**settings), rows_per_step, size, "numbers")


def taken(feed, n, step=0, position=None):
    """The first n windows, as their numbers and all that stands beside them."""
    drawn = islice(feed.windows(step, position or {}), n)
    return [([e.input_ids[0] for e in w.examples], w.places, w.epoch, w.ends_epoch, dict(w.position)) for w in drawn]


@pytest.mark.parametrize("known", ["counted", "unknown", "claimed"])
@pytest.mark.parametrize("n, size, each", [(23, 5, 4), (23, 1, 3), (23, 100, 4), (2, 3, 4), (25, 8, 5), (26, 24, 20)])
def test_windows_follow_the_naive_order_and_go_on_anywhere(n, size, each, known):
    expected = []
    for epoch in range(3):
        kept = [row for row in naive_order(range(n), size, 42, epoch) if row % 5]
        expected += [(kept[i : i + each], i + each >= len(kept), epoch) for i in range(0, len(kept), each)]
    windows = taken(stream_of(Numbers(n, known), each, size, max_steps=99), len(expected))
    for (rows, ends, epoch), (numbers, places, done, ends_epoch, position) in zip(expected, windows, strict=True):
        assert (numbers, ends_epoch) == (rows, ends) and places == [f"row {row}" for row in rows]
        assert done == epoch + 1 if ends else epoch <= done < epoch + 1
        assert position["epoch"] == epoch + ends
    assert windows[-1][4]["rows"] == 3 * n and windows[-1][4]["without_target"] == 3 * -(-n // 5)
    for step, (*_, position) in enumerate(windows, start=1):
        feed = stream_of(Numbers(n, known), each, size, max_steps=99)
        assert taken(feed, len(windows) - step, step, json.loads(json.dumps(position))) == windows[step:]


def test_going_on_reads_no_more_than_the_buffer_and_what_follows():
    at = taken(stream_of(Numbers(100_000), 10, 50, max_steps=9999), 4000)[-1][4]
    source = Numbers(100_000)
    taken(stream_of(source, 10, 50, max_steps=9999), 1, 4000, at)
    assert 50 < source.reads < 5000


def test_a_stream_that_became_shorter_is_not_trained_on_in_another_order():
    feed = stream_of(Numbers(30), 4, 5, max_steps=99)
    feed.source.n = 29
    with pytest.raises(DataError, match=r"numbers: has not as many rows as before"):
        taken(feed, 20)
    at = taken(stream_of(Numbers(30), 4, 25, max_steps=99), 3)[-1][4]
    feed.source.n, feed.buffer_size = 20, 25
    with pytest.raises(DataError, match=r"numbers: has not as many rows as before"):
        taken(feed, 20, 3, at)


def test_no_row_keeps_a_target():
    source = Numbers(1)
    with pytest.raises(DataError, match="numbers: no row keeps a target"):
        taken(stream_of(source, 4, 5, max_steps=9), 1)


def peak_of(n):
    """Bytes that a pass over n rows of 1 KB takes at most."""

    class Texts(Numbers):
        def read(self, first=0):
            for number in range(first, self.n):
                yield f"row {number}", f"{number:01000}"

    def made(raws):
        return [Encoded(Example([int(text), 1], [-100, 1]), False, False, 1) for _, text in raws]

    feed = StreamLoader(Texts(n), made, TrainingArguments(), 32, 200, "texts")
    tracemalloc.start()
    try:
        assert any(window.ends_epoch for window in feed.windows())
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_rows():
    assert peak_of(20_000) < 1.3 * peak_of(2_000)
