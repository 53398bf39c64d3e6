"""Rows and examples in columns are the sequences that they stand for, and are small."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from softprompt.data.examples import Example, Examples
from softprompt.data.row_store import RowStore
from softprompt.utils.fingerprints import fingerprint_of_rows

ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9)


@st.composite
def example(draw) -> Example:
    tokens = draw(ids)
    first = draw(st.integers(0, len(tokens)))
    return Example(tokens, [-100] * first + tokens[first:])


@given(st.lists(example(), max_size=9))
def test_examples_are_the_rows_they_were_made_of(rows):
    found = Examples.from_rows(rows)
    assert found == rows and list(found) == rows and len(found) == len(rows) and found[1:] == rows[1:]
    assert found[::-2] == rows[::-2] and [found[-n] for n in range(1, len(rows) + 1)] == rows[::-1]
    assert found.lengths.tolist() == [len(row.input_ids) for row in rows]
    assert found.targets == sum(label != -100 for row in rows for label in row.labels)
    assert found.last_ids == {row.input_ids[-1] for row in rows}
    assert found != [*rows, Example([1], [1])]
    with pytest.raises(IndexError):
        found[len(rows)]


def test_examples_take_four_bytes_a_token():
    found = Examples.from_rows(Example([7] * 50, [-100] * 40 + [7] * 10) for _ in range(1000))
    assert found.input_ids.dtype == np.int32 and found.nbytes <= 4 * 50_000 + 12 * 1000 + 8


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
rows_of_any = st.lists(st.dictionaries(st.text(max_size=3), values, max_size=3), max_size=6)


@given(rows_of_any, st.integers(0, 6))
def test_a_row_store_is_the_list_of_its_rows(rows, n):
    found = RowStore(rows)
    assert found == rows and list(found) == rows and found[::-1] == rows[::-1] and found[-2:] == rows[-2:]
    assert [list(row) for row in found] == [list(row) for row in rows]  # the order of keys, too
    assert found.fingerprint == fingerprint_of_rows(rows) and RowStore().fingerprint == fingerprint_of_rows([])
    assert pickle.loads(pickle.dumps(found[1:])) == rows[1:]
    n = min(n, len(rows))
    last = found.split_off(n)
    assert (list(found), list(last)) == (rows[: len(rows) - n], rows[len(rows) - n :])
    assert found.fingerprint == fingerprint_of_rows(found)
    found.append({"a": "\ud800"})
    assert found[-1] == {"a": "\ud800"} and found.fingerprint == fingerprint_of_rows(found)


def test_equal_rows_have_equal_hashes():
    one, two, three = RowStore([{"a": "x", "b": "y"}, {"b": "y", "a": "x"}, {"a": "x"}]).hashes
    assert one == two != three


def test_rows_take_little_more_than_their_text():
    found = RowStore({"instruction": "今天天气怎么样", "input": "", "output": "很好"} for _ in range(1000))
    assert found.nbytes < 1000 * (len("今天天气怎么样很好".encode()) + 60)
