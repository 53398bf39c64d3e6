"""Dataset → checked rows. A row is a dict of texts; every fault names the file and the line or row it stands in."""

import io
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from softprompt.errors import ConfigError, DataError
from softprompt.fields import is_text
from softprompt.readers import read, read_jsonl, text_of
from softprompt.template import CHAT, Template

Row = dict[str, Any]


def load_rows(
    source: str,
    template: Template,
    columns: Mapping[str, str],
    *,
    config_name: str | None = None,
    split: str = "train",
    usual_columns: Mapping[str, str] | None = None,
) -> list[Row]:
    """Read and check every row of `source` (see `--dataset`), its columns renamed by `columns` (ours → theirs).
    `usual_columns` are those of another dataset: they count where `columns` say nothing and the first row has THEIRS.

    Raises:
        DataError: nothing there, an unreadable format, no rows, a row without a text that template or answer need.
    """
    placed: Iterator[tuple[str, Any]] = ((f"{source}, {where}", row) for where, row in read(source, config_name, split))
    if usual_columns:
        first = next(placed, None)
        placed = chain([] if first is None else [first], placed)
        there = first[1] if first is not None and isinstance(first[1], dict) else {}
        columns = {**{ours: theirs for ours, theirs in usual_columns.items() if theirs in there}, **columns}
    rows = checked_rows(source, placed, template, columns)
    if not rows:
        raise DataError(f"{source} holds no rows; expected at least one with instruction and output")
    return rows


def checked_rows(
    source: str, placed: Iterable[tuple[str, Any]], template: Template, columns: Mapping[str, str]
) -> list[Row]:
    """Rows that begin a dataset, each with its place, checked; `columns` must be there in the first."""
    rows: list[Row] = []
    for place, row in placed:
        if not rows and isinstance(row, dict):
            _check_mapping(source, row, columns)
        rows.append(checked_row(place, row, template, columns))
    return rows


def checked_row(place: str, row: Any, template: Template, columns: Mapping[str, str]) -> Row:
    """One row under our names for its columns, as `checked` has it.

    Raises:
        DataError: it is no row, or lacks a text that template or answer need.
    """
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected an object of columns, found {_kind(row)}")
    return checked(place, _renamed(row, columns), template)


def load_prompts(source: str) -> list[tuple[str, Row]]:
    """Questions of a --prompts_file, each with the line it stands in: a .txt with one a line, or a .jsonl of objects,
    which are not looked into here.

    Raises:
        DataError: not there, not readable, no question in it, an empty line of a .txt before its last question (the
            answers would not stand beside the lines), a line of a .jsonl that is no object.
    """
    path = Path(source)
    if path.is_dir():
        raise DataError(f"--prompts_file {source} is a folder; name a .txt or a .jsonl in it")
    if not path.is_file():
        raise DataError(f"--prompts_file {source}: no such file")
    if path.suffix.lower() == ".txt":
        # \r\n is read as \n; U+2028 and its kin end no line
        lines = [line.rstrip("\n") for line in io.StringIO(text_of(path), newline=None)]
        while not lines[-1].strip():  # what follows the last question is no question
            lines.pop()
        if blank := next((number for number, line in enumerate(lines, start=1) if not line.strip()), None):
            raise DataError(f"{source}, line {blank}: prompt is empty; write a question, or take the line out")
        return [(f"{source}, line {number}", {"prompt": line}) for number, line in enumerate(lines, start=1)]
    if path.suffix.lower() != ".jsonl":
        raise DataError(f"--prompts_file {source}: expected a .txt or a .jsonl")
    rows = [(f"{source}, {where}", row) for where, row in read_jsonl(path)]
    for where, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected an object of columns, found {_kind(row)}")
    return rows


def question(where: str, row: Any, template: Template) -> Row:
    """A question's row, checked: `prompt` stands for the template's first column, beside an optional `input`;
    `messages` are a conversation whose last message is the question.

    Raises:
        DataError: it is no row, or lacks a column, or one is not a text; messages that are none, or that a template of
            single questions has no place for.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object of columns, found {_kind(row)}")
    if "messages" in row and "messages" not in template.fields:
        messages = _messages(where, "messages", row["messages"], least=1, ends_with_answer=False)
        roles = [message["role"] for message in messages]
        if template.spec != CHAT and roles != (["user", "assistant"] * len(roles))[: len(roles) // 2 * 2 + 1]:
            found = ", ".join(roles)
            raise DataError(f"{where}: messages must be user, assistant, … and end with the user's, not {found:.80}")
        return {"messages": messages}
    if "prompt" not in row or "prompt" in template.fields:
        return _texts(where, row, template.fields or ("instruction", "input"), template.optional_fields)
    given = _texts(where, row, ("prompt", "input"), frozenset({"input"}))
    if not (given["prompt"].strip() or given["input"].strip()):
        raise DataError(f"{where}: prompt is empty; write a question")
    try:
        return template.row(given["prompt"], given["input"])
    except ConfigError as error:
        raise DataError(f"{where}: {error}") from None


def _check_mapping(source: str, row: Row, columns: Mapping[str, str]) -> None:
    for ours, theirs in columns.items():
        if theirs not in row:
            raise DataError(
                f"{source}: --columns maps {ours} to {theirs!r}, but the columns are {', '.join(map(str, row))}"
            )


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
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
