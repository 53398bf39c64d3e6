"""Sources of streamed rows: datasets on disk or on the hub that are read during training. Reading may start at any row.

Each source has a number of rows (None if it is not known in advance) and a fingerprint of its content.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from softprompt.data.hub_datasets import from_hub
from softprompt.data.readers import is_blank_line, jsonl_lines, local_path, parquet_rows, parse_jsonl_line
from softprompt.data.split_files import TRAIN
from softprompt.data.splits import Selection, choose, find_splits, hub_dataset_id
from softprompt.utils.errors import ConfigError, DataError, first_line
from softprompt.utils.fingerprints import CACHED_FROM, SAMPLE, cached_text, file_identity

Raw = tuple[str, Any]  # the place of a row, and the row itself or its unparsed line
STREAMABLE_SUFFIXES = (".jsonl", ".parquet")  # formats that can be read starting at any row
PIECE = 1 << 22  # how many bytes of a file are hashed at a time


@dataclass(frozen=True)
class Source:
    """Rows that are read during training.

    Attributes:
        selection: Which rows of which dataset they are.
        rows: The exact number of rows if `counted` is True; otherwise it is the number that the hub states, or None.
        fingerprint: A hash of the rows' content.
        read: Yields rows, starting with a given row (counted from 0), which costs less than reading all rows before it.
            It raises DataError if a row cannot be read.
        notices: Sentences about the dataset for the user.
    """

    selection: Selection
    rows: int | None
    fingerprint: str
    read: Callable[[int], Iterator[Raw]]
    counted: bool = True
    notices: Sequence[str] = ()


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
        return _hub_source(source, config_name, split, flag)
    there = find_splits(source, config_name)
    name = _whole(there.choose(split, flag), there.parts, flag)
    part, described = there.parts[name], [*there.notices, *there.describe_split("training", name)]
    if isinstance(part, list):
        return _file_source(part, there.selection(name), described, keep)
    return _folder_source(source, part, there.selection(name), described, keep)


def _whole(name: str, names: Iterable[str], flag: str) -> str:
    """Return the name of a split.

    Raises:
        ConfigError: It is a slice rather than a whole split.
    """
    if name not in names:
        raise ConfigError(f"{flag} {name}: --streaming reads whole splits; name one, or leave --streaming out")
    return name


def scan_file(path: Path, keep: bool = True) -> tuple[int, str]:
    """Return the number of rows of a file, and the hash of its bytes.

    Raises:
        DataError: The file cannot be read, or is empty.
    """
    if path.suffix.lower() == ".parquet":
        from pyarrow.parquet import read_metadata

        next(parquet_rows(path), None)
        return read_metadata(path).num_rows, _sha256_of(path, keep)
    next(jsonl_lines(path))
    text = _remembered(path, lambda: "{} {}".format(*_hashed(path)), r"[0-9a-f]{64} \d+", keep)
    sha256, count = text.split()
    return int(count), sha256


def _sha256_of(path: Path, keep: bool) -> str:
    return _remembered(path, lambda: _hashed(path)[0], r"[0-9a-f]{64}", keep)


def _hashed(path: Path) -> tuple[str, int]:
    """Return the hash of a file's bytes, and the number of its non-blank lines."""
    digest, rows = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while lines := file.readlines(PIECE):
            digest.update(b"".join(lines))
            rows += sum(not is_blank_line(line) for line in lines)
    return digest.hexdigest(), rows


def _remembered(path: Path, make: Callable[[], str], pattern: str, keep: bool) -> str:
    """Return `make()`. For a large file, the result is cached under a key that depends on the file's identity and on
    samples of its content. `pattern` matches a valid result; `keep` says whether to write to the cache."""
    size = path.stat().st_size
    if size < CACHED_FROM:
        return make()
    with open(path, "rb") as file:
        parts = [(file.seek(at), file.read(SAMPLE))[1] for at in (0, size // 2, max(0, size - SAMPLE))]
    key = hashlib.sha256(json.dumps([pattern, file_identity(path)]).encode() + b"".join(parts)).hexdigest()
    return cached_text(key, make, pattern, keep)


def _file_source(files: Sequence[Path], selection: Selection, notices: Sequence[str], keep: bool) -> Source:
    """Return a source that reads .jsonl and .parquet files one after the other."""
    if other := next((file for file in files if file.suffix.lower() not in STREAMABLE_SUFFIXES), None):
        raise ConfigError(
            f"--streaming reads .jsonl and .parquet files, folders of them, what Dataset.save_to_disk wrote, and "
            f"hub ids; {other} is none of these: write it as .jsonl, or leave --streaming out"
        )
    counts, hashes = zip(*(scan_file(file, keep) for file in files), strict=True)

    def read(first: int) -> Iterator[Raw]:
        for path, count in zip(files, counts, strict=True):
            if first < count:
                yield from _rows_of(path, first)
            first = max(0, first - count)

    return Source(selection, sum(counts), _hash(hashes), read, notices=notices)


def _rows_of(path: Path, first: int) -> Iterator[Raw]:
    if path.suffix.lower() == ".parquet":
        yield from _numbered(str(path), parquet_rows(path, first), first)
    else:
        for number, line in jsonl_lines(path, first):
            yield f"{path}, line {number}", line


def _numbered(name: str, rows: Any, first: int) -> Iterator[Raw]:
    return ((f"{name}, row {number}", row) for number, row in enumerate(rows, start=first + 1))


def _folder_source(name: str, dataset: Any, selection: Selection, notices: Sequence[str], keep: bool) -> Source:
    """Return a source that reads a folder written by Dataset.save_to_disk, which `datasets` memory-maps."""
    rows, hashes = len(dataset), [_sha256_of(Path(each["filename"]), keep) for each in dataset.cache_files]

    def read(first: int) -> Iterator[Raw]:
        return _numbered(name, dataset.skip(first) if first < rows else (), first)

    return Source(selection, rows, _hash(hashes), read, notices=notices)


def _hub_source(source: str, config_name: str | None, split: str | None, flag: str) -> Source:
    """Return a source that reads a hub dataset while it is downloaded.

    The content cannot be hashed in advance, so the fingerprint is computed from the dataset's configuration and from
    the revisions of its files on the hub.
    """
    from datasets import load_dataset_builder

    builder = from_hub(source, lambda: load_dataset_builder(source, config_name))
    files = getattr(builder.config, "data_files", None) or {}
    names = [str(name) for name in builder.info.splits or files]
    split = _whole(choose(source, names, split, flag), names or (TRAIN,), flag)
    dataset = from_hub(source, lambda: builder.as_streaming_dataset(split=split))
    known = (builder.info.splits or {}).get(split)
    rows = known.num_examples if known and known.num_examples else None
    revisions = [list(map(str, f)) for f in getattr(files.get(split), "origin_metadata", None) or ()]

    def read(first: int) -> Iterator[Raw]:
        try:
            yield from _numbered(source, dataset.skip(first), first)
        except Exception as error:  # a network error after the retries of `datasets`, or a damaged file
            raise DataError(f"dataset {source!r}: cannot be read any further: {first_line(error)}") from None

    selection = Selection(hub_dataset_id(source, config_name), {split: [(0, sys.maxsize)]})
    fingerprint = _hash([builder.hash, builder.config_id, split, rows, revisions])
    return Source(selection, rows, fingerprint, read, counted=False)


def skip_first(source: Source, skipped: int) -> Source:
    """Return a source without its first rows.

    The number of skipped rows is part of the fingerprint: with another number, a resumed run could use rows that were
    trained on as held-out rows.
    """
    return replace(
        source,
        rows=None if source.rows is None else max(0, source.rows - skipped),
        fingerprint=_hash([source.fingerprint, skipped]),
        read=lambda first: source.read(first + skipped),
    )


def _hash(values: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
