"""The splits of a dataset: which there are, which one is meant, and which rows and files it consists of.

A file is one split called train. So is a folder of files, unless their names (or those of their folders) name splits
as `datasets` reads them: train-00000-of-00002.parquet, data/test.jsonl, validation/rows.csv.
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from softprompt.data.readers import READERS, Located, first_line, load_folder, load_hub, path_of
from softprompt.utils.errors import DataError

TRAIN = "train"
HELD_OUT = ("validation", "valid", "val", "dev", "test")  # of these the first that is there, where none is named
WORDS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
SHARD = re.compile(r"(\w+(?:\.\w+)*)-(\d{5,})-of-(\d{5,})(?:-\w+)?")  # a file's name as push_to_hub makes it
OF_SAVE_TO_DISK = ("state.json", "dataset_dict.json")
NO_ROWS = ("dataset_info.json", "dataset_infos.json")  # beside the rows of a hub dataset
UNREAD = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tsv", ".arrow", ".feather", ".xlsx")  # rows that are not read
MOST_NAMED = 20  # files or splits in a message


class Extent(NamedTuple):
    """Which rows of which dataset: `home` is the same for the same dataset, `spans` are the rows of each split that
    were taken, `files` are those that they stand in."""

    home: str
    spans: Mapping[str, Sequence[tuple[int, int]]]
    files: frozenset[str] = frozenset()

    def meets(self, other: "Extent") -> bool:
        """Whether some row is in both."""
        if self.home != other.home:
            return bool(self.files & other.files)
        return any(
            max(a[0], b[0]) < min(a[1], b[1])
            for split, spans in self.spans.items()
            for a in spans
            for b in other.spans.get(split, ())
        )


class Taken(NamedTuple):
    """Rows of a dataset, each with its place, and which they are; `split` as it would be named."""

    split: str
    rows: Located
    extent: Extent


@dataclass(frozen=True)
class Splits:
    """A dataset's splits by name: the files of each, or its Dataset. Where they have no names (`named`), there is one,
    called train. `notes` say what of the dataset is in none of them."""

    source: str
    home: str
    parts: Mapping[str, Any]
    named: bool = True
    notes: Sequence[str] = field(default_factory=list)

    def choose(self, split: str | None, flag: str) -> str:
        """See `choose`."""
        return choose(self.source, list(self.parts) if self.named else [], split, flag)

    def told(self, rows: str, split: str) -> list[str]:
        """Which split the training or held-out rows are, where there are several."""
        names = _listed(list(self.parts))
        return [f"{rows} rows: split {split} of {self.source}, which has {names}"] if len(self.parts) > 1 else []

    def extent(self, name: str) -> Extent:
        """Of a whole split."""
        return Extent(self.home, {name: [(0, sys.maxsize)]}, self._files(name))

    def take(self, split: str | None, flag: str) -> Taken:
        """The rows of a split, or of slices of splits, as `datasets` spells them: train[:100], train[90%:], a+b.

        Raises:
            DataError: the dataset has no such split, or it is no such slice.
        """
        spec = self.choose(split, flag)
        if spec in self.parts:
            return Taken(spec, self._rows(spec), self.extent(spec))
        pieces = _pieces(spec, {name: self._count(name) for name in names_in(spec)}, flag)
        spans: dict[str, list[tuple[int, int]]] = {}
        for name, start, stop in pieces:
            spans.setdefault(name, []).append((start, stop))
        rows = chain.from_iterable(self._rows(*piece) for piece in pieces)
        return Taken(spec, rows, Extent(self.home, spans, frozenset().union(*map(self._files, spans))))

    def _rows(self, name: str, start: int = 0, stop: int = sys.maxsize) -> Located:
        part = self.parts[name]
        if not isinstance(part, list):
            some = part if (start, stop) == (0, sys.maxsize) else part.select(range(start, stop))
            return ((f"row {number}", row) for number, row in enumerate(some, start=start + 1))
        return islice(chain.from_iterable(map(self._rows_of_file, part)), start, stop)

    def _rows_of_file(self, file: Path) -> Located:
        rows, folder = READERS[file.suffix.lower()](file), Path(self.source)
        return rows if file == folder else ((f"{file.relative_to(folder)}, {where}", row) for where, row in rows)

    def _count(self, name: str) -> int:
        return sum(1 for _ in self._rows(name)) if isinstance(self.parts[name], list) else len(self.parts[name])

    def _files(self, name: str) -> frozenset[str]:
        part = self.parts[name]
        files = part if isinstance(part, list) else [each["filename"] for each in part.cache_files]
        return frozenset(str(Path(file).resolve()) for file in files)


def choose(source: str, names: Sequence[str], split: str | None, flag: str) -> str:
    """The split that is meant, or slices of splits: `split`, else (for held-out rows) the first of HELD_OUT that is
    there, else the only one. `names` are those of the dataset; without any, all its rows are the split train.

    Raises:
        DataError: there is no such split, or none is named and it is not clear which one is meant.
    """
    if split is None:
        held_out = [name for name in HELD_OUT if name in names]
        if len(names) > 1 and not held_out:
            raise DataError(f"{source} has the splits {_listed(names)}; name the one to hold out with {flag}")
        return held_out[0] if held_out else names[0] if names else TRAIN
    unknown = [name for name in ([split] if split in names else names_in(split)) if name not in (names or (TRAIN,))]
    if unknown and names:
        raise DataError(f"{source} has no split {unknown[0]!r}; {flag} takes one of {_listed(names)}")
    if unknown:
        raise DataError(f"{source} has no splits, so {flag} {split} names none of it; leave that out")
    return split


def names_in(spec: str) -> list[str]:
    """The splits whose slices `spec` adds up."""
    return list(dict.fromkeys(part.split("[")[0].strip() for part in spec.split("+")))


def splits_of(source: str, config_name: str | None) -> Splits:
    """The splits of a dataset (see `--dataset`); files are not opened yet.

    Raises:
        DataError: nothing there, or no format that can be read.
    """
    path = path_of(source)
    if path is None:
        return _of_datasets(source, hub_home(source, config_name), load_hub(source, config_name))
    home = str(path.resolve())
    if not path.is_dir():
        return Splits(source, home, {TRAIN: [path]}, named=False)
    files = [] if any((path / name).exists() for name in OF_SAVE_TO_DISK) else shards(path)
    return _of_files(source, home, path, files) if files else _of_datasets(source, home, load_folder(path))


def hub_home(source: str, config_name: str | None) -> str:
    """See `Extent`."""
    return f"hub {source} {config_name}"


def shards(folder: Path) -> list[Path]:
    """The files of rows of a folder, by name; where it has none itself, those of its folders (data/ in a hub
    repository)."""
    return _files_of(folder.iterdir()) or _files_of(folder.rglob("*"), folder)


def _files_of(paths: Iterator[Path], folder: Path | None = None) -> list[Path]:
    """Without hidden files, and below `folder` those of hidden folders."""
    return sorted(
        path
        for path in paths
        if path.suffix.lower() in READERS
        and path.name not in NO_ROWS
        and not any(part.startswith(".") for part in (path.relative_to(folder).parts if folder else (path.name,)))
        and path.is_file()
    )


def _of_files(source: str, home: str, folder: Path, files: Sequence[Path]) -> Splits:
    notes, named = list(_missing(folder, files)), {file: _split_of(file.relative_to(folder)) for file in files}
    names = {name for name in named.values() if name}
    if len(names) == 1 and not _word_in(next(iter(names))):  # data-00000-of-00002
        names, named = set(), dict.fromkeys(files)
    parts: dict[str, Any] = {name: [f for f in files if named[f] == name] for name in sorted(names)}
    others = [file for file in files if named[file] is None]
    if others and TRAIN not in parts:
        parts = {TRAIN: others, **parts}
    elif others:
        notes.append(f"{source}: left out, since their names name no split: {_relative(folder, others)}")
    unread = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in UNREAD]
    if unread:
        notes.append(f"{source}: not read: {_relative(folder, unread)}; rows are read from {', '.join(READERS)}")
    below = [] if files[0].parent != folder else _files_of(folder.rglob("*"), folder)
    if nested := [file for file in below if file.parent != folder]:
        notes.append(f"{source}: left out, in folders beside files of rows: {_relative(folder, nested)}")
    return Splits(source, home, parts, named=bool(names), notes=notes)


def _split_of(path: Path) -> str | None:
    """The split that a file's name or folder names."""
    if shard := SHARD.fullmatch(path.stem):
        return shard[1]
    return next((word for name in (path.stem, *reversed(path.parts[:-1])) if (word := _word_in(name))), None)


def _word_in(name: str) -> str | None:
    return next((WORDS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in WORDS), None)


def _missing(folder: Path, files: Sequence[Path]) -> Iterator[str]:
    """Shards that others count, and that are not there."""
    found: dict[tuple[str, int], set[int]] = {}
    for file in files:
        if shard := SHARD.fullmatch(file.stem):
            name = str(file.relative_to(folder).with_name(shard[1]))
            found.setdefault((name, int(shard[3])), set()).add(int(shard[2]))
    for (name, count), there in found.items():
        if len(there) < count:
            yield f"warning: {folder}: {len(there):,} of the {count:,} shards of {name} are there, the others' rows not"


def _of_datasets(source: str, home: str, loaded: Any) -> Splits:
    named = isinstance(loaded, dict)
    return Splits(source, home, dict(loaded) if named else {TRAIN: loaded}, named)


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


def _relative(folder: Path, files: Sequence[Path]) -> str:
    return _listed([file.relative_to(folder).as_posix() for file in files])


def _listed(names: Sequence[str]) -> str:
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more:,} more" if more > 0 else "")
