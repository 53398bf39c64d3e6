"""The mean of a few observations and how far it can be trusted: Student's t."""

import functools
import math
from collections.abc import Sequence
from statistics import mean, stdev


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and the ends of its 95 % interval; all of the line for fewer than two values or where one is not finite."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return (mean(values) if values and all(map(math.isfinite, values)) else math.nan), -math.inf, math.inf
    half = student_t(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return mean(values), mean(values) - half, mean(values) + half


@functools.cache
def student_t(degrees: int, share: float = 0.975) -> float:
    """The value below which a Student-t variable lies with probability `share`: its density summed by Simpson's rule,
    and the value found by halving."""
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)

    def density(x: float) -> float:
        return scale * (1 + x * x / degrees) ** (-(degrees + 1) / 2)

    def below(x: float, steps: int = 2000) -> float:
        width = x / steps
        inner = sum((4 if i % 2 else 2) * density(i * width) for i in range(1, steps))
        return 0.5 + width / 3 * (density(0) + inner + density(x))

    low, high = 0.0, 100.0
    for _ in range(50):
        low, high = ((low + high) / 2, high) if below((low + high) / 2) < share else (low, (low + high) / 2)
    return low
