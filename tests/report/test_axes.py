"""Axes of charts: limits and ticks."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softprompt.report.axes import Axis, needs_log_scale, number, share_axis, step_axis, value_axis

VALUES = st.lists(st.floats(-1e6, 1e6).filter(lambda x: x == 0 or abs(x) > 1e-6), min_size=1, max_size=6)
POSITIVE = st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=6)


def read(label: str) -> float:
    return float(label.rstrip("%").replace(",", "")) / (100 if label.endswith("%") else 1)


def check(axis: Axis, values: list[float]) -> None:
    """An axis holds its values, and its ticks are ascending, inside, few, and where their labels say."""
    assert all(-1e-9 <= axis.fraction(value) <= 1 + 1e-9 for value in values)
    assert list(axis.ticks) == sorted(set(axis.ticks)) and len(set(axis.labels)) == len(axis.labels)
    assert 2 <= len(axis.ticks) <= 9 and len(axis.labels) == len(axis.ticks)
    for tick, label in zip(axis.ticks, axis.labels, strict=True):
        assert -1e-9 <= axis.fraction(tick) <= 1 + 1e-9
        assert math.isclose(read(label), tick, rel_tol=1e-6, abs_tol=1e-12), (tick, label)


@given(VALUES)
def test_a_linear_axis_holds_its_values(values):
    check(value_axis(values), values)


@given(POSITIVE)
def test_an_axis_from_zero_begins_there(values):
    axis = value_axis(values, from_zero=True)
    check(axis, values)
    assert axis.low == 0 == axis.ticks[0]


@given(POSITIVE)
def test_a_logarithmic_axis_is_taken_where_the_values_span_decades(values):
    axis = value_axis(values, logarithmic=True)
    check(axis, values)
    assert axis.logarithmic == needs_log_scale(values) == (max(values) >= 20 * min(values))


@given(st.integers(1, 10**7))
def test_steps_are_whole_numbers_from_zero(last):
    axis = step_axis(last)
    check(axis, [0, last])
    assert axis.low == 0 and axis.high == last and all(tick == int(tick) for tick in axis.ticks)


def test_shares_are_labelled_in_percent():
    check(share_axis(), [0, 1])
    assert share_axis().labels[0] == "0%" and share_axis().labels[-1] == "100%"


@pytest.mark.parametrize("value, text", [(12345.6, "12,346"), (0.020731, "0.02073"), (3, "3")])
def test_numbers_have_four_digits(value, text):
    assert number(value) == text
