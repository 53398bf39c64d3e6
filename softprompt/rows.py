"""Dataset → checked rows. A row is a dict of texts; every fault names the file and the line or row it stands in.

JSON and CSV are read with Python's own modules rather than with `datasets`, whose readers guess types (a column of
dates becomes timestamps, "NA" in a CSV becomes null) and do not say which line is broken; folders and hub ids are read
with `datasets`, parquet files with what it reads them with.
"""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from softprompt import hub
from softprompt.errors import ConfigError, DataError
from softprompt.fields import is_text
from softprompt.template import CHAT, Template

Row = dict[str, Any]
Located = Iterator[tuple[str, Any]]  # ("line 7", row)


def load_rows(
    source: str, template: Template, columns: dict[str, str], *, config_name: str | None = None, split: str = "train"
) -> list[Row]:
    """Read and check every row of `source` (see `--dataset`), its columns renamed by `columns` (ours → theirs).

    Raises:
        DataError: nothing there, an unreadable format, no rows, a row without a text that template or answer need.
    """
    rows: list[Row] = []
    for where, row in _read(source, config_name, split):
        if not isinstance(row, dict):
            raise DataError(f"{source}, {where}: expected an object of columns, found {_kind(row)}")
        if not rows:
            _check_mapping(source, row, columns)
        rows.append(checked(f"{source}, {where}", _renamed(row, columns), template))
    if not rows:
        raise DataError(f"{source} holds no rows; expected at least one with instruction and output")
    return rows


def load_prompts(source: str) -> list[tuple[str, Row]]:
    """Questions of a --prompts_file, each with the line it stands in: a .txt with one a line, or a .jsonl of objects,
    which are not looked into here.

    Raises:
        DataError: not there, not readable, no question in it, a line that is no object.
    """
    path = Path(source)
    if not path.is_file():
        raise DataError(f"--prompts_file {source}: no such file")
    if path.suffix.lower() == ".txt":
        lines = io.StringIO(_text(path), newline=None)  # \r\n is read as \n; U+2028 and its kin end no line
        texts = ((f"line {number}", line.rstrip("\n")) for number, line in enumerate(lines, start=1))
        return [(f"{source}, {where}", {"prompt": text}) for where, text in texts if text.strip()]
    if path.suffix.lower() != ".jsonl":
        raise DataError(f"--prompts_file {source}: expected a .txt or a .jsonl")
    rows = [(f"{source}, {where}", row) for where, row in _read_jsonl(path)]
    for where, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected an object of columns, found {_kind(row)}")
    return rows


def question(where: str, row: Any, template: Template) -> Row:
    """A question's row, checked: `prompt` stands for the template's first column, beside an optional `input`.

    Raises:
        DataError: it is no row, or lacks a column, or one is not a text.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object of columns, found {_kind(row)}")
    if "prompt" not in row or "prompt" in template.fields:
        return _texts(where, row, template.fields or ("instruction", "input"), template.optional_fields)
    given = _texts(where, row, ("prompt", "input"), frozenset({"input"}))
    if not (given["prompt"].strip() or given["input"].strip()):
        raise DataError(f"{where}: prompt is empty; write a question")
    try:
        return template.row(given["prompt"], given["input"])
    except ConfigError as error:
        raise DataError(f"{where}: {error}") from None


def _read(source: str, config_name: str | None, split: str) -> Located:
    if source.startswith("mini:"):
        raise DataError(f"{source!r} is served by the package itself, not read from a file")
    path = Path(source)
    readers = {".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    if path.is_dir():
        return _read_folder(path, split)
    if path.suffix.lower() in readers:
        if not path.is_file():
            raise DataError(f"{source}: no such file")
        return readers[path.suffix.lower()](path)
    if path.exists():
        raise DataError(
            f"{source}: expected a file ending in {', '.join(readers)}, or a folder of Dataset.save_to_disk"
        )
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise DataError(f"{source}: no such file or folder")
    return _read_hub(source, config_name, split)


def _text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")  # a byte order mark, as Windows editors write, is no fault
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}, line {line}: not UTF-8; save the file as UTF-8 (iconv -f GBK -t UTF-8, for instance)"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if not text.strip():
        raise DataError(f"{path} is empty; expected at least one row")
    return text


def _parsed(text: str, path: Path, first_line: int, expected: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}, line {first_line + error.lineno - 1}"
        raise DataError(f"{where}: not JSON: {error.msg}; expected {expected}") from None
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{path}, line {first_line}: {error}") from None
    except RecursionError:
        raise DataError(f"{path}, line {first_line}: nested too deeply to be a row") from None


def _read_jsonl(path: Path, expected: str = "one object a line") -> Located:
    # split("\n"), not splitlines(): U+2028 and its kin may stand unescaped inside a JSON string
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            yield f"line {number}", _parsed(line, path, number, expected)


def _read_json(path: Path) -> Located:
    text = _text(path)
    if not text.lstrip().startswith("["):
        yield from _read_jsonl(path, "a list of objects, or one object a line")  # many a .json file holds the latter
    else:
        yield from _numbered(_parsed(text, path, 1, "a list of objects"))


def _read_csv(path: Path) -> Located:
    csv.field_size_limit(2**31 - 1)  # by default 128 KiB, less than a text may have
    reader, begins = csv.reader(io.StringIO(_text(path), newline=""), strict=True), 1
    header: list[str] = []
    try:
        for fields in reader:
            line, begins = begins, reader.line_num + 1  # a quoted field may go over several lines
            if header and fields:
                if len(fields) != len(header):
                    raise DataError(f"{path}, line {line}: {len(fields)} fields where the header names {len(header)}")
                yield f"line {line}", dict(zip(header, fields, strict=True))
            header = header or fields
    except csv.Error as error:
        raise DataError(f"{path}, line {begins}: not CSV: {error}") from None


def _numbered(rows: Any) -> Located:
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", row


def _read_parquet(path: Path) -> Located:
    from pyarrow.parquet import ParquetFile

    try:
        rows = ParquetFile(path).read().to_pylist()
    except Exception as error:
        raise DataError(f"{path}: not a parquet file: {_first_line(error)}") from None
    yield from _numbered(rows)


def _read_folder(path: Path, split: str) -> Located:
    from datasets import load_from_disk

    try:
        dataset = load_from_disk(str(path))
    except Exception as error:
        found = _first_line(error)
        raise DataError(f"{path}: expected a folder of Dataset.save_to_disk that holds rows: {found}") from None
    if isinstance(dataset, dict):
        if split not in dataset:
            raise DataError(f"{path} has no split {split!r}; --dataset_split takes one of {', '.join(dataset)}")
        dataset = dataset[split]
    return _numbered(dataset)


def _read_hub(source: str, config_name: str | None, split: str) -> Located:
    from datasets import load_dataset

    hub.prepare()
    try:
        dataset = load_dataset(source, config_name, split=split)
    except Exception as error:
        raise DataError(
            f"dataset {source!r}: no such file or folder here, and not loadable from the hub "
            f"({_first_line(error)}); {hub.HELP}"
        ) from None
    return _numbered(dataset)


def _check_mapping(source: str, row: Row, columns: dict[str, str]) -> None:
    for ours, theirs in columns.items():
        if theirs not in row:
            raise DataError(
                f"{source}: --columns maps {ours} to {theirs!r}, but the columns are {', '.join(map(str, row))}"
            )


def _renamed(row: Row, columns: dict[str, str]) -> Row:
    return {**row, **{ours: row.get(theirs) for ours, theirs in columns.items()}}


def checked(where: str, row: Row, template: Template) -> Row:
    """Only the columns that are used, each of the type that is asked for."""
    if template.spec == CHAT and "messages" in row:
        return {"messages": _messages(where, "messages", row["messages"], least=2, ends_with_answer=True)}
    if template.spec == CHAT and "prompt" in row:
        return {
            "prompt": _text_or_messages(where, row, "prompt"),
            "completion": _text_or_messages(where, row, "completion", ends_with_answer=True),
        }
    names = template.fields or ("instruction", "input")
    return _texts(
        where, row, (*names, "output"), template.optional_fields, " (--columns {}=THEIRS names another column)"
    )


def _texts(where: str, row: Row, names: tuple[str, ...], optional: frozenset[str], hint: str = "") -> Row:
    checked = {}
    for name in names:
        value = row.get(name)
        if value is None and name in optional:
            value = ""
        if not is_text(value):
            found = "there is none" if name not in row else f"found {_kind(value)}"
            raise DataError(f"{where}: column {name!r} must be a text, {found}{hint.format(name)}")
        checked[name] = value
    return checked


def _text_or_messages(where: str, row: Row, name: str, ends_with_answer: bool = False) -> Any:
    value = row.get(name)
    return value if is_text(value) else _messages(where, name, value, 1, ends_with_answer)


def _messages(where: str, name: str, value: Any, least: int, ends_with_answer: bool) -> list[dict[str, str]]:
    good = (
        isinstance(value, list)
        and len(value) >= least
        and all(isinstance(m, dict) and is_text(m.get("role")) and is_text(m.get("content")) for m in value)
    )
    if not good or (ends_with_answer and value[-1]["role"] != "assistant"):
        number, end = f"{least} or more ", " that ends with the assistant's" if ends_with_answer else ""
        raise DataError(f"{where}: {name!r} must be a list of {number}{{role, content}} messages{end}")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _kind(value: Any) -> str:
    names = {
        type(None): "null",
        bool: "true/false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    if isinstance(value, str):
        return "a text" if is_text(value) else "half a character (one surrogate of a pair)"
    return names.get(type(value), type(value).__name__)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
