"""Training examples as token ids, stored in a few numpy arrays: 4 bytes a token, and 12 bytes a row."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, overload

import numpy as np

IGNORE = -100  # the label of a position without a loss, as PyTorch's cross entropy takes it by default


class Example(NamedTuple):
    """One row as the model sees it: T token ids and T labels.

    Labels are -100 where no loss is taken. They are -100 at a row's first token in any case, because the base alone has
    nothing to predict that token from.
    """

    input_ids: list[int]
    labels: list[int]


class Examples(Sequence[Example]):
    """Examples in columns. An item is an `Example`, whose lists are made when it is asked for.

    The labels of a row are -100 before its first target, and its token ids from there on, so they are not stored.
    Arrays may be memory-mapped.

    Args:
        input_ids: int32 of all tokens, row after row.
        offsets: int64 [rows + 1], where each row begins in `input_ids`, and where the last one ends.
        first_targets: int32 [rows], the index in its row of the first token that is a target.
    """

    def __init__(self, input_ids: np.ndarray, offsets: np.ndarray, first_targets: np.ndarray):
        self.input_ids, self.offsets, self.first_targets = input_ids, offsets, first_targets

    @classmethod
    def from_rows(cls, rows: Iterable[Example]) -> "Examples":
        """Store examples whose labels are -100 up to some token, and the token ids from there on."""
        ids, lengths, first_targets = array("i"), array("i"), array("i")
        for row in rows:
            ids.extend(row.input_ids)
            lengths.append(len(row.input_ids))
            first_targets.append(row.labels.count(IGNORE))
        return cls.from_columns(ids, lengths, first_targets)

    @classmethod
    def from_columns(cls, input_ids: array, lengths: array, first_targets: array) -> "Examples":
        """Take over arrays of C ints, which are not copied and must not grow any more."""
        offsets = np.concatenate([[0], np.cumsum(as_numpy(lengths), dtype=np.int64)])
        return cls(as_numpy(input_ids), offsets, as_numpy(first_targets))

    @property
    def nbytes(self) -> int:
        return self.input_ids.nbytes + self.offsets.nbytes + self.first_targets.nbytes

    @property
    def lengths(self) -> np.ndarray:
        """int64 [rows], the tokens of each row."""
        return np.diff(self.offsets)

    @property
    def targets(self) -> int:
        """The number of tokens that a loss is taken at, in all rows."""
        return len(self.input_ids) - int(self.first_targets.sum(dtype=np.int64))

    @property
    def last_ids(self) -> set[int]:
        """The ids that rows end with."""
        return set(np.unique(self.input_ids[self.offsets[1:] - 1]).tolist())

    def __len__(self) -> int:
        return len(self.first_targets)

    @overload
    def __getitem__(self, at: int) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> list[Example]: ...
    def __getitem__(self, at: int | slice) -> Example | list[Example]:
        if isinstance(at, slice):
            return [self[number] for number in range(*at.indices(len(self)))]
        at = range(len(self))[at]  # negative numbers count from the end; others out of range raise IndexError
        ids = self.input_ids[self.offsets[at] : self.offsets[at + 1]].tolist()
        first = int(self.first_targets[at])
        return Example(ids, [IGNORE] * first + ids[first:])

    def __iter__(self) -> Iterator[Example]:
        return map(self.__getitem__, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(map(Example.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]  # as lists have none

    def __repr__(self) -> str:
        return f"Examples({len(self):,} rows, {len(self.input_ids):,} tokens)"


def as_numpy(values: array) -> np.ndarray:
    """An array of C ints as int32, not copied."""
    return np.frombuffer(values, dtype=np.int32)


def count_targets(example: Example) -> int:
    """Positions that a loss is taken at: every label but -100."""
    return len(example.labels) - example.labels.count(IGNORE)
