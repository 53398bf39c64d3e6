"""Which rank computes which rows."""

import heapq
from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def assign_rows(costs: Sequence[int], size: int) -> list[list[int]]:
    """Divide rows among ranks so that the ranks' total costs are about equal.

    Greedy scheduling: the most expensive rows first, each to the rank with the smallest total (Graham 1969,
    doi:10.1137/0117039). The result is the same on every rank.

    Args:
        costs: The cost of each row, such as its number of tokens.
        size: The number of ranks.

    Returns:
        For each rank, the indices of its rows.
    """
    assigned: list[list[int]] = [[] for _ in range(size)]
    loads = [(0, rank) for rank in range(size)]  # a heap; among equal loads the lowest rank comes first
    for row in sorted(range(len(costs)), key=lambda row: -costs[row]):
        load, rank = loads[0]
        assigned[rank].append(row)
        heapq.heapreplace(loads, (load + costs[row], rank))
    return assigned


def select(rows: Sequence[T], indices: Iterable[int]) -> list[T]:
    """Return the rows at `indices`, in that order."""
    return [rows[index] for index in indices]
