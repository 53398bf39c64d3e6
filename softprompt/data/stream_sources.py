"""Datasets that are read from the disk or the hub while they are trained on, from any of their rows onwards.

Each says how many rows it has (None where nobody knows before the end) and has a fingerprint of its content.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from softprompt.data.readers import first_line, from_hub, is_blank, jsonl_lines, parquet_rows, parsed_line, path_of
from softprompt.data.splits import TRAIN, Extent, choose, hub_home, splits_of
from softprompt.utils.errors import ConfigError, DataError
from softprompt.utils.fingerprints import CACHED_FROM, SAMPLE, cached_text, file_identity

Raw = tuple[str, Any]  # the place of a row, and the row, or the line of a file that it is still to be made of
READ = (".jsonl", ".parquet")  # files that can be read from any row on
PIECE = 1 << 22  # bytes of a file that are looked at together


class Source(Protocol):
    """`rows` were `counted`, or are what a hub says. `extent` says which rows of which dataset they are, `notes` what
    of the dataset is not among them."""

    @property
    def extent(self) -> Extent: ...
    @property
    def notes(self) -> Sequence[str]: ...
    @property
    def counted(self) -> bool: ...
    @property
    def rows(self) -> int | None: ...
    @property
    def fingerprint(self) -> str: ...

    def read(self, first: int = 0) -> Iterator[Raw]:
        """Rows from number `first` (from 0) on; reaching it costs less than reading what is before it.

        Raises:
            DataError: what is there cannot be read any more.
        """
        ...


def placed(raw: Raw) -> tuple[str, Any]:
    """The place, and the row itself.

    Raises:
        DataError: its line is not UTF-8, or not JSON.
    """
    place, value = raw
    return place, parsed_line(place, value) if isinstance(value, bytes) else value


def open_source(
    source: str, config_name: str | None, split: str | None, keep: bool = True, flag: str = "--dataset_split"
) -> Source:
    """A split of what `--dataset` names, for `--streaming`. Local files are gone through once, to count and to hash
    them; what was found of large ones is cached_text (if `keep`) for as long as they stay as they are.

    Raises:
        DataError: it is not there, has no such split, or holds no rows that can be read.
        ConfigError: it is of a kind that is only read as a whole, or slices of splits are asked for.
    """
    if path_of(source) is None:
        return _OnTheHub(source, config_name, split, flag)
    there = splits_of(source, config_name)
    name = _whole(there.choose(split, flag), there.parts, flag)
    part, extent, notes = there.parts[name], there.extent(name), [*there.notes, *there.told("training", name)]
    if not isinstance(part, list):
        return _Saved(source, part, extent, notes, keep)
    if other := next((file for file in part if file.suffix.lower() not in READ), None):
        raise ConfigError(
            f"--streaming reads .jsonl and .parquet files, folders of them, what Dataset.save_to_disk wrote, and "
            f"hub ids; {other} is none of these: write it as .jsonl, or leave --streaming out"
        )
    return Files(part, [survey(file, keep) for file in part], extent, notes)


def _whole(name: str, names: Iterable[str], flag: str) -> str:
    """The name of a split, which slices of splits are not."""
    if name not in names:
        raise ConfigError(f"{flag} {name}: --streaming reads whole splits; name one, or leave --streaming out")
    return name


class Survey(NamedTuple):
    """Of one file."""

    rows: int
    sha256: str


def survey(path: Path, keep: bool = True) -> Survey:
    """How many rows a file of READ has, and the hash of its bytes.

    Raises:
        DataError: it cannot be read, or is empty.
    """
    if path.suffix.lower() == ".parquet":
        next(parquet_rows(path), None)
        rows, pattern = parquet_count(path), r"[0-9a-f]{64}"
        return Survey(rows, _remembered(path, lambda: _hashed(path)[0], pattern, keep))
    next(jsonl_lines(path))
    text = _remembered(path, lambda: "{} {}".format(*_hashed(path)), r"[0-9a-f]{64} \d+", keep)
    sha256, count = text.split()
    return Survey(int(count), sha256)


def parquet_count(path: Path) -> int:
    from pyarrow.parquet import read_metadata

    return read_metadata(path).num_rows


def _hashed(path: Path) -> tuple[str, int]:
    """The hash of a file's bytes, and how many of its lines hold a row."""
    digest, rows = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while lines := file.readlines(PIECE):
            digest.update(b"".join(lines))
            rows += sum(not is_blank(line) for line in lines)
    return digest.hexdigest(), rows


def _remembered(path: Path, make: Callable[[], str], pattern: str, keep: bool) -> str:
    size = path.stat().st_size
    if size < CACHED_FROM:
        return make()
    with open(path, "rb") as file:
        parts = [(file.seek(at), file.read(SAMPLE))[1] for at in (0, size // 2, max(0, size - SAMPLE))]
    key = hashlib.sha256(json.dumps([pattern, file_identity(path)]).encode() + b"".join(parts)).hexdigest()
    return cached_text(key, make, pattern, keep)


@dataclass(frozen=True)
class Files:
    """.jsonl and .parquet files, one after the other."""

    files: Sequence[Path]
    surveys: Sequence[Survey]
    extent: Extent
    notes: Sequence[str] = ()
    counted = True

    @property
    def rows(self) -> int:
        return sum(each.rows for each in self.surveys)

    @property
    def fingerprint(self) -> str:
        return _hash([each.sha256 for each in self.surveys])

    def read(self, first: int = 0) -> Iterator[Raw]:
        for path, each in zip(self.files, self.surveys, strict=True):
            if first < each.rows:
                yield from _rows_of(path, first)
            first = max(0, first - each.rows)


def _rows_of(path: Path, first: int) -> Iterator[Raw]:
    if path.suffix.lower() == ".parquet":
        yield from _numbered(str(path), parquet_rows(path, first), first)
    else:
        for number, line in jsonl_lines(path, first):
            yield f"{path}, line {number}", line


def _numbered(name: str, rows: Any, first: int) -> Iterator[Raw]:
    return ((f"{name}, row {number}", row) for number, row in enumerate(rows, start=first + 1))


class _Saved:
    """What Dataset.save_to_disk wrote: memory-mapped by datasets."""

    counted = True

    def __init__(self, name: str, dataset: Any, extent: Extent, notes: Sequence[str], keep: bool):
        self.name, self.dataset, self.extent, self.notes = name, dataset, extent, notes
        self.rows = len(self.dataset)
        files = [Path(each["filename"]) for each in self.dataset.cache_files]
        hashes = [_remembered(file, lambda file=file: _hashed(file)[0], r"[0-9a-f]{64}", keep) for file in files]
        self.fingerprint = _hash(hashes)

    def read(self, first: int = 0) -> Iterator[Raw]:
        rows = self.dataset.skip(first) if first < self.rows else ()
        return _numbered(self.name, rows, first)


class _OnTheHub:
    """A hub id, read by datasets while it arrives. Its content cannot be hashed beforehand: the fingerprint is of the
    revision that the hub has, as datasets knows it."""

    counted, notes = False, ()

    def __init__(self, source: str, config_name: str | None, split: str | None, flag: str):
        from datasets import load_dataset_builder

        self.source = source
        builder = from_hub(source, lambda: load_dataset_builder(source, config_name))
        files = getattr(builder.config, "data_files", None) or {}
        names = [str(name) for name in builder.info.splits or files]
        split = _whole(choose(source, names, split, flag), names or (TRAIN,), flag)
        self.extent = Extent(hub_home(source, config_name), {split: [(0, sys.maxsize)]})
        self.dataset = from_hub(source, lambda: builder.as_streaming_dataset(split=split))
        known = (builder.info.splits or {}).get(split)
        self.rows = known.num_examples if known and known.num_examples else None
        revisions = [list(map(str, f)) for f in getattr(files.get(split), "origin_metadata", None) or ()]
        self.fingerprint = _hash([builder.hash, builder.config_id, split, self.rows, revisions])

    def read(self, first: int = 0) -> Iterator[Raw]:
        try:
            yield from _numbered(self.source, self.dataset.skip(first), first)
        except Exception as error:  # of the network, after datasets has tried again, or of a file there
            raise DataError(f"dataset {self.source!r}: cannot be read on: {first_line(error)}") from None


@dataclass(frozen=True)
class Behind:
    """A source without its first rows. Without others it is another source: rows that were trained on would become
    held-out ones."""

    source: Source
    skipped: int

    @property
    def counted(self) -> bool:
        return self.source.counted

    @property
    def extent(self) -> Extent:
        return self.source.extent

    @property
    def notes(self) -> Sequence[str]:
        return self.source.notes

    @property
    def rows(self) -> int | None:
        return None if self.source.rows is None else max(0, self.source.rows - self.skipped)

    @property
    def fingerprint(self) -> str:
        return _hash([self.source.fingerprint, self.skipped])

    def read(self, first: int = 0) -> Iterator[Raw]:
        return self.source.read(first + self.skipped)


def head(source: Source, n: int) -> list[Raw]:
    """The first rows, at most `n`."""
    return list(islice(source.read(), n))


def _hash(values: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
