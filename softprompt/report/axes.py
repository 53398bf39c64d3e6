"""Axes of charts: their limits, and their ticks with labels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

LOG_SCALE_RATIO = 20  # use a logarithmic scale if the largest value is at least this many times the smallest
TICKS = 5  # about how many intervals an axis has


@dataclass(frozen=True)
class Axis:
    """An axis from `low` to `high`, with ticks at some values between them and a label for each tick."""

    low: float
    high: float
    ticks: Sequence[float]
    labels: Sequence[str]
    logarithmic: bool = False

    def fraction(self, value: float) -> float:
        """Return the position of a value on the axis, from 0 at its beginning to 1 at its end."""
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def value_axis(values: Sequence[float], logarithmic: bool = False, from_zero: bool = False) -> Axis:
    """Return an axis that begins and ends with a tick.

    Args:
        values: The values that the axis must contain; at least one.
        logarithmic: Use a logarithmic scale if `needs_log_scale` says so.
        from_zero: Begin at 0; the values are not negative.
    """
    if logarithmic and needs_log_scale(values):
        return _log_axis(min(values), max(values))
    low, high = (0.0 if from_zero else min(values)), max(values)
    if low == high:
        around = abs(low) / 10 or 1.0
        low, high = low - (0 if from_zero else around), high + around
    step = nice_step((high - low) / TICKS)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return _ticked(first * step, last * step, step)


def step_axis(last: float) -> Axis:
    """Return the axis of the optimizer steps, or of other whole numbers, from 0 to `last`."""
    return _ticked(0, max(last, 1), max(1, nice_step(last / TICKS)))


def share_axis() -> Axis:
    """Return an axis of fractions, labelled in percent."""
    ticks = [0, 0.25, 0.5, 0.75, 1]
    return Axis(-0.03, 1.03, ticks, [f"{tick:.0%}" for tick in ticks])


def needs_log_scale(values: Sequence[float]) -> bool:
    """Return whether all values are above 0 and the largest is at least LOG_SCALE_RATIO times the smallest."""
    return 0 < LOG_SCALE_RATIO * min(values) <= max(values)


def nice_step(least: float) -> float:
    """Return the smallest of 1, 2, 5, 10, 20, 50, …, and of 0.5, 0.2, 0.1, …, that is at least `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10, 20) if factor * power >= least * (1 - 1e-9))


def number(value: float, step: float | None = None) -> str:
    """Return a number as text, with as many decimals as multiples of `step` need. Without `step`, it has four
    significant digits."""
    if step is None:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if value and decimals > 4:
        digits, _, power = f"{value:.{max(0, decimals - 1 - _decimals_before(value))}e}".partition("e")
        return f"{digits}e{int(power)}"
    return f"{value:,.{decimals if value else 0}f}"


def _decimals_before(value: float) -> int:
    """Return how many zeros follow the decimal point of a number below 1."""
    return -math.floor(math.log10(abs(value)) + 1e-9) - 1


def _ticked(low: float, high: float, step: float) -> Axis:
    count = math.floor((high - low) / step + 1e-9)
    ticks = [low + n * step for n in range(count + 1)]
    ticks = [0.0 if abs(tick) < step / 1e6 else tick for tick in ticks]
    return Axis(low, high, ticks, [number(tick, step) for tick in ticks])


def _log_axis(low: float, high: float) -> Axis:
    """Return an axis with ticks at powers of ten; if these are few, also at 2 and 5 times these powers."""
    low, high = low / 1.1, high * 1.1  # room beyond the outermost points
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    few = sum(low <= 10.0**power for power in powers) < 3
    every, factors = (1, (1, 2, 5)) if few else (-(-len(powers) // (TICKS + 1)), (1,))
    found = [factor * 10.0**power for power in powers[::-every][::-1] for factor in factors]
    ticks = [tick for tick in found if low <= tick <= high]
    return Axis(low, high, ticks, [f"{tick:g}".replace("e-0", "e-") for tick in ticks], logarithmic=True)
