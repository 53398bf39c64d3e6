"""Dataset → checked rows. A row is a dict of texts; every fault names the file and the line or row it stands in.

JSON and CSV are read with Python's own modules rather than with `datasets`, whose readers guess types (a column of
dates becomes timestamps, "NA" in a CSV becomes null) and do not say which line is broken; folders, parquet files and
hub ids are read with `datasets`.
"""

import csv
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from softprompt import hub
from softprompt.errors import DataError
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
        rows.append(_checked(f"{source}, {where}", _renamed(row, columns), template))
    if not rows:
        raise DataError(f"{source} holds no rows; expected at least one with instruction and output")
    return rows


def load_prompts(source: str, template: Template) -> list[Row]:
    """Questions of a --prompts_file: a .txt with one a line, or a .jsonl with `prompt` or the template's columns.

    Raises:
        DataError: not there, not readable, no question in it, a line without its columns.
    """
    path = Path(source)
    if not path.is_file():
        raise DataError(f"--prompts_file {source}: no such file")
    if path.suffix.lower() == ".txt":
        rows = [template.row(line) for line in _text(path).splitlines() if line.strip()]
    elif path.suffix.lower() == ".jsonl":
        rows = [question(f"{source}, {where}", row, template) for where, row in _read_jsonl(path)]
    else:
        raise DataError(f"--prompts_file {source}: expected a .txt or a .jsonl")
    return rows


def question(where: str, row: Any, template: Template) -> Row:
    """A question's row, checked: `prompt` stands for the template's first column, beside an optional `input`.

    Raises:
        DataError: it is no row, or lacks a column, or one is not a text.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object of columns, found {_kind(row)}")
    if isinstance(row.get("prompt"), str) and "prompt" not in template.fields:
        extra = row.get("input") or ""
        if not isinstance(extra, str):
            raise DataError(f"{where}: column 'input' must be a text, found {_kind(extra)}")
        return template.row(row["prompt"], extra)
    return _texts(where, row, template.fields or ("instruction", "input"), template)


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
        raise DataError(f"{path} is empty; expected rows with instruction and output")
    return text


def _parsed(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {first_line + error.lineno - 1}: not JSON: {error.msg}") from None
    except RecursionError:
        raise DataError(f"{path}, line {first_line}: nested too deeply to be a row") from None


def _read_jsonl(path: Path) -> Located:
    # split("\n"), not splitlines(): U+2028 and its kin may stand unescaped inside a JSON string
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            yield f"line {number}", _parsed(line, path, number)


def _read_json(path: Path) -> Located:
    text = _text(path)
    if not text.lstrip().startswith("["):
        yield from _read_jsonl(path)  # many a .json file holds one object a line
        return
    for number, row in enumerate(_parsed(text, path, 1), start=1):
        yield f"row {number}", row


def _read_csv(path: Path) -> Located:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                found = sum(value is not None for key, value in row.items() if key is not None) + len(
                    row.get(None) or []
                )
                raise DataError(
                    f"{path}, line {reader.line_num}: {found} fields where the header names "
                    f"{len(reader.fieldnames or [])}"
                )
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not CSV: {error}") from None


def _numbered(rows: Any) -> Located:
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", row


def _read_parquet(path: Path) -> Located:
    from datasets import Dataset

    with tempfile.TemporaryDirectory() as cache:
        try:
            dataset = Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True)
        except Exception as error:
            raise DataError(f"{path}: not a parquet file: {_first_line(error.__cause__ or error)}") from None
    yield from _numbered(dataset)


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


def _checked(where: str, row: Row, template: Template) -> Row:
    """Only the columns that are used, each of the type that is asked for."""
    if template.spec == CHAT and "messages" in row:
        return {"messages": _messages(where, "messages", row["messages"], ends_with_answer=True)}
    if template.spec == CHAT and "prompt" in row:
        return {
            "prompt": _text_or_messages(where, row, "prompt"),
            "completion": _text_or_messages(where, row, "completion", ends_with_answer=True),
        }
    names = template.fields or ("instruction", "input")
    return _texts(where, row, (*names, "output"), template)


def _texts(where: str, row: Row, names: tuple[str, ...], template: Template) -> Row:
    checked = {}
    for name in names:
        value = row.get(name)
        if value is None and name in template.optional_fields:
            value = ""
        if not isinstance(value, str):
            found = "there is none" if name not in row else f"found {_kind(value)}"
            raise DataError(
                f"{where}: column {name!r} must be a text, {found} (--columns {name}=THEIRS names another column)"
            )
        checked[name] = value
    return checked


def _text_or_messages(where: str, row: Row, name: str, ends_with_answer: bool = False) -> Any:
    value = row.get(name)
    return value if isinstance(value, str) else _messages(where, name, value, ends_with_answer)


def _messages(where: str, name: str, value: Any, ends_with_answer: bool) -> list[dict[str, str]]:
    good = (
        isinstance(value, list)
        and value
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
        )
    )
    if not good or (ends_with_answer and value[-1]["role"] != "assistant"):
        end = " that ends with the assistant's" if ends_with_answer else ""
        raise DataError(f"{where}: {name!r} must be a list of {{role, content}} messages{end}")
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
    return "a text" if isinstance(value, str) else names.get(type(value), type(value).__name__)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
