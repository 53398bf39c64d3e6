"""Read rows, unchanged and with their line or row number, from files.

JSON and CSV are read with Python's own modules rather than with `datasets`, whose readers guess types (a column of
dates becomes timestamps, "NA" in a CSV becomes null) and do not say which line is broken. Folders of save_to_disk and
hub datasets are read with `datasets` (see `hub_datasets`), parquet files with pyarrow.
"""

import csv
import io
import json
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from softprompt.utils.errors import DataError, first_line

LocatedRows = Iterator[tuple[str, Any]]  # ("line 7", row)
BATCH = 1024  # how many rows of a parquet file are converted at a time


def local_path(source: str) -> Path | None:
    """Return the path of a local dataset, which is a folder or a file of a known format; None if `source` may be a hub
    id.

    Raises:
        DataError: `source` is none of these.
    """
    if source.startswith("mini:"):
        raise DataError(f"{source!r} is served by the package itself, not read from a file")
    path = Path(source)
    if path.is_dir():
        return path
    if path.suffix.lower() in READERS:
        if not path.is_file():
            raise DataError(f"{source}: no such file; name an existing file, folder or hub dataset")
        return path
    if path.exists():
        raise DataError(
            f"{source}: expected a file ending in {', '.join(READERS)}, a folder of such files, or one of "
            "Dataset.save_to_disk"
        )
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise DataError(f"{source}: no such file or folder; name an existing one, or a hub dataset")
    return None


def read_text(path: Path) -> str:
    """Read a text file that holds rows.

    Raises:
        DataError: See `decode_text`, or the file is empty.
    """
    text = decode_text(path)
    if not text.strip():
        raise DataError(f"{path} is empty; expected at least one row")
    return text


def decode_text(path: Path) -> str:
    """Read a text file, which may be empty.

    Raises:
        DataError: The file cannot be read or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")  # Windows editors write a byte order mark
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise _not_utf8(f"{path}, line {line}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def jsonl_lines(path: Path, first: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield the non-blank lines of a .jsonl file, starting with row `first` (counted from 0), each with its line number
    (counted from 1).

    Raises:
        DataError: The file cannot be read, or holds no row at all.
    """
    rows = 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not is_blank_line(line):
                    if rows >= first:
                        yield number, (line.removeprefix(BOM_UTF8) if number == 1 else line).rstrip(b"\n")
                    rows += 1
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if not rows:
        raise DataError(f"{path} is empty; expected at least one row")


def is_blank_line(line: bytes) -> bool:
    """Whether a line of a .jsonl file is blank and so holds no row."""
    return line.strip() in (b"", BOM_UTF8)


def parse_jsonl_line(place: str, line: bytes, expected: str = "one object a line") -> Any:
    """Parse a line of a .jsonl file. In error messages, `place` names the line, and `expected` says what it should
    hold.

    Raises:
        DataError: The line is not UTF-8, or not JSON.
    """
    try:
        text = line.decode()
    except UnicodeDecodeError:
        raise _not_utf8(place) from None
    return _parsed(text, lambda _: place, expected)


def _not_utf8(place: str) -> DataError:
    return DataError(f"{place}: not UTF-8; save the file as UTF-8 (iconv -f GBK -t UTF-8, for instance)")


def _parsed(text: str, place: Callable[[int], str], expected: str) -> Any:
    """Parse JSON. `place` returns the name, for error messages, of a line of the text, counted from 1."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except _Twice as error:
        raise DataError(f"{place(1)}: an object has the key {error} twice; rename one of them") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{place(error.lineno)}: not JSON: {error.msg}; expected {expected}") from None
    except ValueError as error:  # Python refuses integers of more than 4,300 digits
        raise DataError(f"{place(1)}: {error}") from None
    except RecursionError:
        raise DataError(f"{place(1)}: nested too deeply to be a row") from None


class _Twice(Exception):
    """Raised for a key that an object has twice; json would silently keep only the second value."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise _Twice(repr(_first_twice([name for name, _ in pairs])))
    return made


def _first_twice(names: Sequence[str]) -> str | None:
    return next((name for at, name in enumerate(names) if name in names[:at]), None)


def read_jsonl(path: Path, expected: str = "one object a line") -> LocatedRows:
    """Yield the rows of a .jsonl file. Lines end only at "\\n", because JSON strings may contain an unescaped U+2028.

    Raises:
        DataError: The file cannot be read or holds no row, or a line is not UTF-8 or not JSON.
    """
    for number, line in jsonl_lines(path):
        yield f"line {number}", parse_jsonl_line(f"{path}, line {number}", line, expected)


def _read_json(path: Path) -> LocatedRows:
    text = read_text(path)
    if not text.lstrip().startswith("["):
        yield from read_jsonl(path, "a list of objects, or one object a line")  # many .json files are JSON Lines
    else:
        yield from _numbered(_parsed(text, lambda line: f"{path}, line {line}", "a list of objects"))


def _read_csv(path: Path) -> LocatedRows:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is too small for long texts
    reader, begins = csv.reader(io.StringIO(read_text(path), newline=""), strict=True), 1
    header: list[str] = []
    try:
        for fields in reader:
            line, begins = begins, reader.line_num + 1  # a quoted field may span several lines
            if header and fields:
                if len(fields) != len(header):
                    raise DataError(f"{path}, line {line}: {len(fields)} fields where the header names {len(header)}")
                yield f"line {line}", dict(zip(header, fields, strict=True))
            header = header or _header(path, line, fields)
    except csv.Error as error:
        raise DataError(f"{path}, line {begins}: not CSV: {error}") from None


def _header(path: Path, line: int, names: list[str]) -> list[str]:
    """Return the column names after checking that none occurs twice, except the empty name, which results from a comma
    at the end of the line."""
    if (twice := _first_twice([name for name in names if name])) is not None:
        raise DataError(f"{path}, line {line}: the header names {twice!r} twice; rename one of these columns")
    if len(names) == 1 and (other := next((mark for mark in ";\t|" if mark in names[0]), None)):
        raise DataError(f"{path}, line {line}: columns are separated by {other!r}; save the file with commas")
    return names


def _numbered(rows: Any) -> LocatedRows:
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", row


def parquet_rows(path: Path, first: int = 0) -> Iterator[Any]:
    """Yield the rows of a parquet file, starting with row `first` (counted from 0). Row groups before it are not read.

    Raises:
        DataError: The file is not a parquet file, is damaged, or has two columns of the same name.
    """
    from pyarrow.parquet import ParquetFile

    row = 0
    try:
        with ParquetFile(path) as file:
            if (twice := _first_twice(file.schema_arrow.names)) is not None:
                raise DataError(f"{path}: two columns are named {twice!r}; rename one of them")
            for group in range(file.num_row_groups):
                n = file.metadata.row_group(group).num_rows
                if row + n <= first:
                    row += n
                    continue
                for batch in file.iter_batches(BATCH, row_groups=[group]):
                    yield from batch.slice(max(0, first - row)).to_pylist()
                    row += len(batch)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path}: not a parquet file: {first_line(error)}") from None


READERS: dict[str, Callable[[Path], LocatedRows]] = {
    ".json": _read_json,
    ".jsonl": read_jsonl,
    ".csv": _read_csv,
    ".parquet": lambda path: _numbered(parquet_rows(path)),
}
