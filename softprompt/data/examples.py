"""Training examples as token ids, stored in a few numpy arrays: 4 bytes per token and 12 bytes per row."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, cast, overload

import numpy as np

IGNORE = -100  # the label of a token that is not a target: the default ignore_index of PyTorch's cross entropy


class Example(NamedTuple):
    """One tokenized row: T token ids and T labels.

    The label of a token is its id if the token is a target, else -100. In rows to train or to evaluate on, the first
    token is not a target, because the base without a prompt has nothing to predict it from.
    """

    input_ids: list[int]
    labels: list[int]


class Examples(Sequence[Example]):
    """Examples stored as arrays. An item is an `Example`, whose lists are made on access.

    The labels of a row are -100 before its first target, and its token ids from there on, so they are not stored.
    Arrays may be memory-mapped.

    Args:
        input_ids: The token ids of all rows, one row after the other, [tokens] int32.
        offsets: The index in `input_ids` at which each row begins, and at which the last row ends, [rows + 1] int64.
        first_targets: For each row the index of its first target, counted from the row's beginning, [rows] int32.
    """

    def __init__(self, input_ids: np.ndarray, offsets: np.ndarray, first_targets: np.ndarray):
        self.input_ids, self.offsets, self.first_targets = input_ids, offsets, first_targets

    @classmethod
    def from_rows(cls, rows: Iterable[Example]) -> "Examples":
        """Store examples. The labels of each must be -100 before its first target, and its token ids from there on."""
        ids, lengths, first_targets = array("i"), array("i"), array("i")
        for row in rows:
            ids.extend(row.input_ids)
            lengths.append(len(row.input_ids))
            first_targets.append(row.labels.count(IGNORE))
        return cls.from_columns(ids, lengths, first_targets)

    @classmethod
    def from_columns(cls, input_ids: array, lengths: array, first_targets: array) -> "Examples":
        """Use arrays of C ints without copying them; they must not be appended to afterwards."""
        offsets = np.concatenate([[0], np.cumsum(as_numpy(lengths), dtype=np.int64)])
        return cls(as_numpy(input_ids), offsets, as_numpy(first_targets))

    @property
    def nbytes(self) -> int:
        """The size of the arrays in bytes."""
        return self.input_ids.nbytes + self.offsets.nbytes + self.first_targets.nbytes

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each row, int64 [rows]."""
        return np.diff(self.offsets)

    @property
    def targets(self) -> int:
        """The number of targets of all rows."""
        return len(self.input_ids) - int(self.first_targets.sum(dtype=np.int64))

    @property
    def last_ids(self) -> set[int]:
        """The set of the rows' last token ids."""
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


class IndexedExamples(Examples):
    """Examples in which the label of a target is its number among all targets of all rows, counted from 0, instead of
    its token id. An entry in a table can thus be found for each target; see `engines.distillation`."""

    def __init__(self, examples: Examples):
        super().__init__(examples.input_ids, examples.offsets, examples.first_targets)
        counts = self.lengths - self.first_targets
        self._first_labels = np.cumsum(counts) - counts  # of each row, int64 [rows]

    @overload
    def __getitem__(self, at: int) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> list[Example]: ...
    def __getitem__(self, at: int | slice) -> Example | list[Example]:
        found = super().__getitem__(at)
        if isinstance(found, list):
            return found
        at = range(len(self))[cast(int, at)]
        first, label = int(self.first_targets[at]), int(self._first_labels[at])
        targets = len(found.input_ids) - first
        return Example(found.input_ids, [IGNORE] * first + list(range(label, label + targets)))


def as_numpy(values: array) -> np.ndarray:
    """Return an array of C ints as an int32 array that shares its memory."""
    return np.frombuffer(values, dtype=np.int32)


def count_targets(example: Example) -> int:
    """Return the number of targets: labels other than -100."""
    return len(example.labels) - example.labels.count(IGNORE)
