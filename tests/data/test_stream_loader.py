"""A stream's order is the shuffle buffer's, going on anywhere gives the same windows, and memory is bounded."""

import json
import tracemalloc
from collections import Counter
from itertools import islice

import pytest

from softprompt.config.train_args import TrainingArguments
from softprompt.data.encoding import Encoded
from softprompt.data.stream_loader import ShuffleBuffer, StreamLoader
from softprompt.data.tokenization import Example
from softprompt.utils.errors import DataError

GOLDEN = {  # checkpoints of earlier versions go on in these orders: they must never change
    0: [3, 5, 6, 0, 2, 11, 8, 12, 9, 13, 4, 15, 7, 14, 19, 16, 1, 21, 17, 20, 18, 22, 10],
    1: [1, 4, 0, 7, 6, 10, 9, 3, 13, 8, 15, 11, 12, 18, 2, 5, 21, 19, 14, 16, 22, 20, 17],
}


def order_of(n, size, seed=42, epoch=0):
    return list(ShuffleBuffer(size, seed, epoch).through(iter(range(n))))


@pytest.mark.parametrize("n", [0, 1, 2, 7, 50])
@pytest.mark.parametrize("size", [1, 2, 7, 49, 50, 1000])
def test_an_order_is_a_permutation_within_reach_of_the_buffer(n, size):
    for seed, epoch in ((42, 0), (42, 1), (7, 0)):
        order = order_of(n, size, seed, epoch)
        assert sorted(order) == list(range(n)) and order == order_of(n, size, seed, epoch)
        assert all(row < place + size for place, row in enumerate(order))  # none comes out before it was read
    assert order_of(n, 1) == list(range(n))


def test_rows_are_shuffled_anew_in_each_epoch_and_for_each_seed():
    orders = [order_of(500, 100, seed, epoch) for seed in (1, 2) for epoch in (0, 1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_every_row_of_a_full_buffer_is_as_likely_as_any_other():
    first = Counter(order_of(100, 10, seed)[0] for seed in range(2000))
    assert set(first) == set(range(10)) and min(first.values()) > 130 and max(first.values()) < 270  # 200 ± 5 sigma


@pytest.mark.parametrize("epoch", GOLDEN)
def test_the_order_of_a_seed_never_changes(epoch):
    assert order_of(23, 7, 42, epoch) == GOLDEN[epoch]


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


KINDS = pytest.mark.parametrize("known", ["counted", "unknown", "claimed"])
CASES = pytest.mark.parametrize(
    "n, size, each", [(23, 5, 4), (23, 1, 3), (23, 100, 4), (2, 3, 4), (25, 8, 5), (26, 24, 20)]
)


@KINDS
@CASES
def test_each_pass_has_every_row_with_a_target_once_in_full_windows(n, size, each, known):
    kept = [number for number in range(n) if number % 5]
    per_pass = -(-len(kept) // each)
    windows = taken(stream_of(Numbers(n, known), each, size, max_steps=99), 3 * per_pass)
    for epoch in range(3):
        of_pass = windows[epoch * per_pass : (epoch + 1) * per_pass]
        assert sorted(number for numbers, *_ in of_pass for number in numbers) == kept
        assert all(len(numbers) == each for numbers, *_ in of_pass[:-1])
        assert [ends_epoch for *_, ends_epoch, _ in of_pass] == [False] * (per_pass - 1) + [True]
        assert of_pass[-1][2] == epoch + 1 and of_pass[-1][4]["epoch"] == epoch + 1
        assert all(epoch <= done < epoch + 1 for _, _, done, _, _ in of_pass[:-1])
        assert all(position["epoch"] == epoch for *_, position in of_pass[:-1])
    assert all(places == [f"row {number}" for number in numbers] for numbers, places, *_ in windows)
    assert windows[-1][4]["rows"] == 3 * n and windows[-1][4]["without_target"] == 3 * -(-n // 5)


@KINDS
@CASES
def test_going_on_anywhere_gives_the_same_rest(n, size, each, known):
    windows = taken(stream_of(Numbers(n, known), each, size, max_steps=99), 18)
    for step, (*_, position) in enumerate(windows, start=1):
        feed = stream_of(Numbers(n, known), each, size, max_steps=99)
        assert taken(feed, len(windows) - step, step, json.loads(json.dumps(position))) == windows[step:]


@pytest.mark.parametrize("epoch", GOLDEN)
def test_windows_have_the_order_of_the_buffer(epoch):
    windows = taken(stream_of(Numbers(23), 4, 7, max_steps=99), 10)
    numbers = [number for numbers, *_ in windows[5 * epoch : 5 * epoch + 5] for number in numbers]
    assert numbers == [number for number in GOLDEN[epoch] if number % 5]


def test_going_on_reads_no_more_than_the_buffer_and_what_follows():
    at = taken(stream_of(Numbers(100_000), 10, 50, max_steps=9999), 4000)[-1][4]
    source = Numbers(100_000)
    taken(stream_of(source, 10, 50, max_steps=9999), 1, 4000, at)
    assert 50 < source.reads < 5000


def test_a_stream_that_became_shorter_is_not_trained_on_in_another_order():
    feed = stream_of(Numbers(30), 4, 5, max_steps=99)
    feed.source.n = 29
    with pytest.raises(DataError, match=r"numbers: does not have as many rows as before"):
        taken(feed, 20)
    at = taken(stream_of(Numbers(30), 4, 25, max_steps=99), 3)[-1][4]
    feed.source.n, feed.buffer_size = 20, 25
    with pytest.raises(DataError, match=r"numbers: does not have as many rows as before"):
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
