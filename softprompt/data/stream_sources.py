"""Sources of streamed rows: datasets on disk or on the hub that are read during training. Reading may start at any row.

Each source has a number of rows (None if it is not known in advance) and a fingerprint of its content.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from softprompt.data.readers import (
    first_line,
    from_hub,
    is_blank_line,
    jsonl_lines,
    local_path,
    parquet_rows,
    parse_jsonl_line,
)
from softprompt.data.splits import TRAIN, Selection, choose, find_splits, hub_dataset_id
from softprompt.utils.errors import ConfigError, DataError
from softprompt.utils.fingerprints import CACHED_FROM, SAMPLE, cached_text, file_identity

Raw = tuple[str, Any]  # the place of a row, and the row itself or its unparsed line
STREAMABLE_SUFFIXES = (".jsonl", ".parquet")  # formats that can be read starting at any row
PIECE = 1 << 22  # how many bytes of a file are hashed at a time


class Source(Protocol):
    """Rows that are read during training.

    `rows` is the exact number of rows if `counted` is True; otherwise it is the number that the hub states, or None.
    `selection` describes which rows of which dataset they are. `notices` are sentences about the dataset for the user.
    """

    @property
    def selection(self) -> Selection: ...
    @property
    def notices(self) -> Sequence[str]: ...
    @property
    def counted(self) -> bool: ...
    @property
    def rows(self) -> int | None: ...
    @property
    def fingerprint(self) -> str: ...

    def read(self, first: int = 0) -> Iterator[Raw]:
        """Yield rows, starting with row `first` (counted from 0), which costs less than reading all rows before it.

        Raises:
            DataError: A row cannot be read.
        """
        ...


def parse_row(raw: Raw) -> tuple[str, Any]:
    """Return the place of a row and the row itself, parsed if it was a line.

    Raises:
        DataError: The line is not UTF-8, or not JSON.
    """
    place, value = raw
    return place, parse_jsonl_line(place, value) if isinstance(value, bytes) else value


def open_source(
    source: str, config_name: str | None, split: str | None, keep: bool = True, flag: str = "--dataset_split"
) -> Source:
    """Open a split of a dataset for `--streaming`.

    Local files are read once, to count their rows and to hash their content. For large files the result is cached until
    the file changes; if `keep` is False, it is not written to the cache.

    Raises:
        DataError: There is no such dataset or split, or it holds no rows that can be read.
        ConfigError: The format cannot be streamed, or `split` is a slice.
    """
    if local_path(source) is None:
        return _OnTheHub(source, config_name, split, flag)
    there = find_splits(source, config_name)
    name = _whole(there.choose(split, flag), there.parts, flag)
    part, selection, notices = (
        there.parts[name],
        there.selection(name),
        [*there.notices, *there.describe_split("training", name)],
    )
    if not isinstance(part, list):
        return _Saved(source, part, selection, notices, keep)
    if other := next((file for file in part if file.suffix.lower() not in STREAMABLE_SUFFIXES), None):
        raise ConfigError(
            f"--streaming reads .jsonl and .parquet files, folders of them, what Dataset.save_to_disk wrote, and "
            f"hub ids; {other} is none of these: write it as .jsonl, or leave --streaming out"
        )
    return Files(part, [scan_file(file, keep) for file in part], selection, notices)


def _whole(name: str, names: Iterable[str], flag: str) -> str:
    """Return the name of a split.

    Raises:
        ConfigError: It is a slice rather than a whole split.
    """
    if name not in names:
        raise ConfigError(f"{flag} {name}: --streaming reads whole splits; name one, or leave --streaming out")
    return name


class FileScan(NamedTuple):
    """The number of rows of a file, and the hash of its bytes."""

    rows: int
    sha256: str


def scan_file(path: Path, keep: bool = True) -> FileScan:
    """Count the rows of a file, and hash its bytes.

    Raises:
        DataError: The file cannot be read, or is empty.
    """
    if path.suffix.lower() == ".parquet":
        next(parquet_rows(path), None)
        rows, pattern = count_parquet_rows(path), r"[0-9a-f]{64}"
        return FileScan(rows, _remembered(path, lambda: _hashed(path)[0], pattern, keep))
    next(jsonl_lines(path))
    text = _remembered(path, lambda: "{} {}".format(*_hashed(path)), r"[0-9a-f]{64} \d+", keep)
    sha256, count = text.split()
    return FileScan(int(count), sha256)


def count_parquet_rows(path: Path) -> int:
    from pyarrow.parquet import read_metadata

    return read_metadata(path).num_rows


def _hashed(path: Path) -> tuple[str, int]:
    """Return the hash of a file's bytes, and the number of its non-blank lines."""
    digest, rows = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while lines := file.readlines(PIECE):
            digest.update(b"".join(lines))
            rows += sum(not is_blank_line(line) for line in lines)
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
    """A `Source` that reads .jsonl and .parquet files one after the other."""

    files: Sequence[Path]
    scans: Sequence[FileScan]
    selection: Selection
    notices: Sequence[str] = ()
    counted = True

    @property
    def rows(self) -> int:
        return sum(each.rows for each in self.scans)

    @property
    def fingerprint(self) -> str:
        return _hash([each.sha256 for each in self.scans])

    def read(self, first: int = 0) -> Iterator[Raw]:
        for path, each in zip(self.files, self.scans, strict=True):
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
    """A `Source` that reads a folder written by Dataset.save_to_disk, which `datasets` memory-maps."""

    counted = True

    def __init__(self, name: str, dataset: Any, selection: Selection, notices: Sequence[str], keep: bool):
        self.name, self.dataset, self.selection, self.notices = name, dataset, selection, notices
        self.rows = len(self.dataset)
        files = [Path(each["filename"]) for each in self.dataset.cache_files]
        hashes = [_remembered(file, lambda file=file: _hashed(file)[0], r"[0-9a-f]{64}", keep) for file in files]
        self.fingerprint = _hash(hashes)

    def read(self, first: int = 0) -> Iterator[Raw]:
        rows = self.dataset.skip(first) if first < self.rows else ()
        return _numbered(self.name, rows, first)


class _OnTheHub:
    """A `Source` that reads a hub dataset while it is downloaded.

    The content cannot be hashed in advance, so the fingerprint is computed from the dataset's configuration and from
    the revisions of its files on the hub.
    """

    counted, notices = False, ()

    def __init__(self, source: str, config_name: str | None, split: str | None, flag: str):
        from datasets import load_dataset_builder

        self.source = source
        builder = from_hub(source, lambda: load_dataset_builder(source, config_name))
        files = getattr(builder.config, "data_files", None) or {}
        names = [str(name) for name in builder.info.splits or files]
        split = _whole(choose(source, names, split, flag), names or (TRAIN,), flag)
        self.selection = Selection(hub_dataset_id(source, config_name), {split: [(0, sys.maxsize)]})
        self.dataset = from_hub(source, lambda: builder.as_streaming_dataset(split=split))
        known = (builder.info.splits or {}).get(split)
        self.rows = known.num_examples if known and known.num_examples else None
        revisions = [list(map(str, f)) for f in getattr(files.get(split), "origin_metadata", None) or ()]
        self.fingerprint = _hash([builder.hash, builder.config_id, split, self.rows, revisions])

    def read(self, first: int = 0) -> Iterator[Raw]:
        try:
            yield from _numbered(self.source, self.dataset.skip(first), first)
        except Exception as error:  # a network error after the retries of `datasets`, or a damaged file
            raise DataError(f"dataset {self.source!r}: cannot be read any further: {first_line(error)}") from None


@dataclass(frozen=True)
class SkipFirst:
    """A `Source` without the first rows of another one.

    The number of skipped rows is part of the fingerprint: with another number, a resumed run could use rows that were
    trained on as held-out rows.
    """

    source: Source
    skipped: int

    @property
    def counted(self) -> bool:
        return self.source.counted

    @property
    def selection(self) -> Selection:
        return self.source.selection

    @property
    def notices(self) -> Sequence[str]:
        return self.source.notices

    @property
    def rows(self) -> int | None:
        return None if self.source.rows is None else max(0, self.source.rows - self.skipped)

    @property
    def fingerprint(self) -> str:
        return _hash([self.source.fingerprint, self.skipped])

    def read(self, first: int = 0) -> Iterator[Raw]:
        return self.source.read(first + self.skipped)


def first_rows(source: Source, n: int) -> list[Raw]:
    """Return the first `n` rows, or all rows if there are fewer."""
    return list(islice(source.read(), n))


def _hash(values: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
