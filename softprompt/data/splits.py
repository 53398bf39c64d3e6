"""Find the splits of a dataset, choose one of them, and select its rows.

A file is one split called train. So is a folder of files, unless the names of files or folders name splits in the way
that `datasets` reads them: train-00000-of-00002.parquet, data/test.jsonl, validation/rows.csv.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from softprompt.data.hub_datasets import load_folder, load_hub_dataset
from softprompt.data.readers import READERS, LocatedRows, local_path
from softprompt.data.split_files import TRAIN, listed, shards, splits_of_files
from softprompt.utils.errors import DataError, first_line

HELD_OUT = ("validation", "valid", "val", "dev", "test")  # the first of these that exists is the default held-out split
SAVE_TO_DISK_FILES = ("state.json", "dataset_dict.json")


class Selection(NamedTuple):
    """Rows of a dataset by their numbers, used to find out whether two selections have rows in common.

    `dataset_id` identifies the dataset. `ranges` are (start, stop) row numbers of each split, and `files` the files
    that these rows are in.
    """

    dataset_id: str
    ranges: Mapping[str, Sequence[tuple[int, int]]]
    files: frozenset[str] = frozenset()

    def overlaps(self, other: "Selection") -> bool:
        """Whether the two selections have a row in common."""
        if self.dataset_id != other.dataset_id:
            return bool(self.files & other.files)
        return any(
            max(a[0], b[0]) < min(a[1], b[1])
            for split, ranges in self.ranges.items()
            for a in ranges
            for b in other.ranges.get(split, ())
        )


class SelectedRows(NamedTuple):
    """The rows of a selection, each with its line or row number. `split` is the split or the slices as requested."""

    split: str
    rows: LocatedRows
    selection: Selection


@dataclass(frozen=True)
class Splits:
    """The splits of a dataset. `parts` maps the name of a split to a list of files or to a `datasets.Dataset`.

    A dataset without named splits (`named` is False) has one split called train. `notices` are sentences about files
    that are not read or are missing.
    """

    source: str
    dataset_id: str
    parts: Mapping[str, Any]
    named: bool = True
    notices: Sequence[str] = field(default_factory=list)

    def choose(self, split: str | None, flag: str) -> str:
        """See `choose`."""
        return choose(self.source, list(self.parts) if self.named else [], split, flag)

    def describe_split(self, rows: str, split: str) -> list[str]:
        """Return a sentence that says which split the rows come from, if the dataset has several splits; `rows` is
        "training" or "held-out"."""
        names = listed(list(self.parts))
        return [f"{rows} rows: split {split} of {self.source}, which has {names}"] if len(self.parts) > 1 else []

    def selection(self, name: str) -> Selection:
        """Return the selection of a whole split."""
        return Selection(self.dataset_id, {name: [(0, sys.maxsize)]}, self._files(name))

    def select(self, split: str | None, flag: str) -> SelectedRows:
        """Select a split, or slices of splits in the notation of `datasets`: train[:100], train[90%:], a+b.

        Raises:
            DataError: The dataset has no such split, or the slice is malformed.
        """
        spec = self.choose(split, flag)
        if spec in self.parts:
            return SelectedRows(spec, self._rows(spec), self.selection(spec))
        pieces = _pieces(spec, {name: self._count(name) for name in names_in(spec)}, flag)
        ranges: dict[str, list[tuple[int, int]]] = {}
        for name, start, stop in pieces:
            ranges.setdefault(name, []).append((start, stop))
        rows = chain.from_iterable(self._rows(*piece) for piece in pieces)
        return SelectedRows(
            spec, rows, Selection(self.dataset_id, ranges, frozenset().union(*map(self._files, ranges)))
        )

    def _rows(self, name: str, start: int = 0, stop: int = sys.maxsize) -> LocatedRows:
        part = self.parts[name]
        if not isinstance(part, list):
            some = part if (start, stop) == (0, sys.maxsize) else part.select(range(start, stop))
            return ((f"row {number}", row) for number, row in enumerate(some, start=start + 1))
        return islice(chain.from_iterable(map(self._rows_of_file, part)), start, stop)

    def _rows_of_file(self, file: Path) -> LocatedRows:
        rows, folder = READERS[file.suffix.lower()](file), Path(self.source)
        return rows if file == folder else ((f"{file.relative_to(folder)}, {where}", row) for where, row in rows)

    def _count(self, name: str) -> int:
        return sum(1 for _ in self._rows(name)) if isinstance(self.parts[name], list) else len(self.parts[name])

    def _files(self, name: str) -> frozenset[str]:
        part = self.parts[name]
        files = part if isinstance(part, list) else [each["filename"] for each in part.cache_files]
        return frozenset(str(Path(file).resolve()) for file in files)


def choose(source: str, names: Sequence[str], split: str | None, flag: str) -> str:
    """Choose a split, or slices of splits.

    The result is `split` if it is given, else the first of HELD_OUT that the dataset has, else its only split. A
    dataset without named splits (`names` is empty) has one split called train.

    Args:
        flag: The flag that names the split, for error messages.

    Raises:
        DataError: There is no such split; or none is given, and the dataset has several but none of HELD_OUT.
    """
    if split is None:
        held_out = [name for name in HELD_OUT if name in names]
        if len(names) > 1 and not held_out:
            raise DataError(f"{source} has the splits {listed(names)}; name the one to hold out with {flag}")
        return held_out[0] if held_out else names[0] if names else TRAIN
    unknown = [name for name in ([split] if split in names else names_in(split)) if name not in (names or (TRAIN,))]
    if unknown and names:
        raise DataError(f"{source} has no split {unknown[0]!r}; {flag} takes one of {listed(names)}")
    if unknown:
        raise DataError(f"{source} has no splits; leave {flag} {split} out")
    return split


def names_in(spec: str) -> list[str]:
    """Return the names of the splits in a sum of slices such as train[:10]+test."""
    return list(dict.fromkeys(part.split("[")[0].strip() for part in spec.split("+")))


def find_splits(source: str, config_name: str | None) -> Splits:
    """Find the splits of a dataset (see `--dataset`). Files are not opened yet.

    Raises:
        DataError: There is no such dataset, or its format is not supported.
    """
    path = local_path(source)
    if path is None:
        return _of_datasets(source, hub_dataset_id(source, config_name), load_hub_dataset(source, config_name))
    dataset_id = str(path.resolve())
    if not path.is_dir():
        return Splits(source, dataset_id, {TRAIN: [path]}, named=False)
    files = [] if any((path / name).exists() for name in SAVE_TO_DISK_FILES) else shards(path)
    if not files:
        return _of_datasets(source, dataset_id, load_folder(path))
    return Splits(source, dataset_id, *splits_of_files(source, path, files))


def hub_dataset_id(source: str, config_name: str | None) -> str:
    """Return the `dataset_id` of a hub dataset; see `Selection`."""
    return f"hub {source} {config_name}"


def _of_datasets(source: str, dataset_id: str, loaded: Any) -> Splits:
    named = isinstance(loaded, dict)
    return Splits(source, dataset_id, dict(loaded) if named else {TRAIN: loaded}, named)


def _pieces(spec: str, lengths: Mapping[str, int], flag: str) -> list[tuple[str, int, int]]:
    from datasets import ReadInstruction

    try:
        absolute = ReadInstruction.from_spec(spec).to_absolute(dict(lengths))
    except Exception as error:
        raise DataError(
            f"{flag} {spec}: expected the name of a split, or slices such as train[:100] or train[90%:] "
            f"({first_line(error)})"
        ) from None
    return [(piece.splitname, piece.from_, piece.to) for piece in absolute]
