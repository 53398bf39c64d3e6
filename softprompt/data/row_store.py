"""The rows of a dataset as JSON in one buffer, which takes a fraction of the memory of as many dicts."""

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np

Row = dict[str, Any]


class RowStore(Sequence[Row]):
    """A list of rows to which rows can be appended. An item is parsed on access; a slice is a copy."""

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()):
        self._text, self._ends = bytearray(), array("q")
        self._summary: tuple[int, str, np.ndarray] | None = None
        for row in rows:
            self.append(row)

    def append(self, row: Mapping[str, Any]) -> None:
        # Keys keep their order: a chat template renders the keys of tools in it, and columns are listed in it.
        """Append a row, whose values must be serializable as JSON."""
        self._text += _ENCODER.encode(row).encode("utf-8", "surrogatepass")
        self._ends.append(len(self._text))

    def split_off(self, n: int) -> "RowStore":
        """Remove the last `n` rows and return them."""
        rows = self[len(self) - n :]
        del self._ends[len(self) - n :]
        del self._text[self._ends[-1] if self._ends else 0 :]
        return rows

    @property
    def nbytes(self) -> int:
        """The size of the stored rows in bytes."""
        return len(self._text) + self._ends.itemsize * len(self._ends)

    @property
    def fingerprint(self) -> str:
        """The fingerprint that `fingerprints.fingerprint_of_rows` computes."""
        return self._summarized()[1]

    @property
    def hashes(self) -> np.ndarray:
        """A hash of each row, int64 [rows]. Equal rows have equal hashes; hashes differ between processes."""
        return self._summarized()[2]

    def _summarized(self) -> tuple[int, str, np.ndarray]:
        """Return the number, the fingerprint and the hashes of the rows. They are computed in one pass over the rows,
        and kept until the number of rows changes."""
        if self._summary is None or self._summary[0] != len(self):
            digest, hashes = hashlib.sha256(), np.empty(len(self), dtype=np.int64)
            for number, row in enumerate(self):
                line = _SORTED_ENCODER.encode(row).encode()
                digest.update(line + b"\n")
                hashes[number] = hash(line)
            self._summary = len(self), digest.hexdigest(), hashes
        return self._summary

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, at: int) -> Row: ...
    @overload
    def __getitem__(self, at: slice) -> "RowStore": ...
    def __getitem__(self, at: int | slice) -> "Row | RowStore":
        if isinstance(at, slice):
            start, stop, step = at.indices(len(self))
            if step != 1:
                return RowStore(self[number] for number in range(start, stop, step))
            return self._copied(start, max(start, stop))
        at = range(len(self))[at]  # negative numbers count from the end; others out of range raise IndexError
        return json.loads(self._text[self._begin(at) : self._ends[at]].decode("utf-8", "surrogatepass"))

    def _copied(self, start: int, stop: int) -> "RowStore":
        copy, begin = RowStore(), self._begin(start)
        copy._text = self._text[begin : self._begin(stop)]
        copy._ends = array("q", (end - begin for end in self._ends[start:stop]))
        return copy

    def _begin(self, at: int) -> int:
        return self._ends[at - 1] if at else 0

    def __iter__(self) -> Iterator[Row]:
        return map(self.__getitem__, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # as lists have none

    def __repr__(self) -> str:
        return f"RowStore({len(self):,} rows, {self.nbytes:,} bytes)"


_ENCODER = json.JSONEncoder(ensure_ascii=False)
_SORTED_ENCODER = json.JSONEncoder(sort_keys=True)
