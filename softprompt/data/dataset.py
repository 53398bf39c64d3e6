"""Read a dataset into checked rows. A row is a dict of texts, or of lists of messages for chat templates; each error
names the file and the line or row."""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

from softprompt.config.schema import is_text
from softprompt.data.column_names import columns_hint, describe_columns
from softprompt.data.messages import CONVERSATIONS, describe_type, messages, tools
from softprompt.data.readers import LocatedRows, read_jsonl, read_text
from softprompt.data.row_store import Row, RowStore
from softprompt.data.split_files import TRAIN
from softprompt.data.splits import find_splits
from softprompt.data.template import CHAT, Template
from softprompt.utils.errors import ConfigError, DataError

# Columns of a chat's rows.
CHAT_COLUMNS = ("messages", "prompt", "completion", "instruction", "input", "output", "tools")


def load_rows(
    source: str,
    template: Template,
    columns: Mapping[str, str],
    *,
    config_name: str | None = None,
    split: str | None = TRAIN,
    flag: str = "--dataset_split",
    usual_columns: Mapping[str, str] | None = None,
) -> RowStore:
    """Read and check all rows of one split.

    Args:
        source: The value of `--dataset`.
        columns: The dataset's column name for each of the template's columns.
        split: Name of the split; None selects the held-out split, see `splits.choose`.
        flag: The flag that names the split, for error messages.
        usual_columns: Like `columns`, but used only for columns that `columns` does not name, and only if the first row
            has them.

    Raises:
        DataError: There is no such dataset or split, or the rows are refused by `rows_of`.
    """
    located = find_splits(source, config_name).select(split, flag).rows
    if usual_columns:
        first = next(located, None)
        located = chain([] if first is None else [first], located)
        there = first[1] if first is not None and isinstance(first[1], dict) else {}
        columns = {**{ours: theirs for ours, theirs in usual_columns.items() if theirs in there}, **columns}
    return rows_of(source, located, template, columns)


def rows_of(source: str, located: LocatedRows, template: Template, columns: Mapping[str, str]) -> RowStore:
    """Check the rows of a dataset.

    Raises:
        DataError: The dataset cannot be read or has no rows, or a row lacks a column that the template or the answer
            needs.
    """
    rows = check_rows(source, ((f"{source}, {where}", row) for where, row in located), template, columns)
    if not rows:
        raise DataError(f"{source} holds no rows; expected at least one")
    return rows


def check_rows(
    source: str, located: Iterable[tuple[str, Any]], template: Template, columns: Mapping[str, str]
) -> RowStore:
    """Check rows, each given with its place for error messages. The first row must have all of `columns`."""
    rows = RowStore()
    for place, row in located:
        if not len(rows) and isinstance(row, dict):
            _check_mapping(source, row, template, columns)
        rows.append(check_row(place, row, template, columns))
    return rows


def check_row(place: str, row: Any, template: Template, columns: Mapping[str, str]) -> Row:
    """Rename the columns of one row to the template's, and keep those that are used; see `check_fields`.

    Raises:
        DataError: The row is not an object, or lacks a text that the template or the answer needs.
    """
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected an object of columns, found {describe_type(row)}")
    return check_fields(place, _renamed(row, columns), template, columns)


def load_prompts(source: str, flag: str = "--prompts_file") -> list[tuple[str, Row]]:
    """Read the questions of a --prompts_file, or of the file of another `flag`: a .txt with one question per line, or a
    .jsonl with one object per line.

    Returns:
        Place and row of each question. The columns of the objects in a .jsonl are not checked yet.

    Raises:
        DataError: The file does not exist, cannot be read or holds no question; a .txt has an empty line before its
            last question (the line numbers of questions and answers would differ); a line of a .jsonl is not an object.
    """
    path = Path(source)
    if path.is_dir():
        raise DataError(f"{flag} {source} is a folder; name a .txt or a .jsonl in it")
    if not path.is_file():
        raise DataError(f"{flag} {source}: no such file; name an existing file")
    if path.suffix.lower() == ".txt":
        # \r\n is read as \n; U+2028 and the like do not end a line
        lines = [line.rstrip("\n") for line in io.StringIO(read_text(path), newline=None)]
        while not lines[-1].strip():  # blank lines after the last question are ignored
            lines.pop()
        if blank := next((number for number, line in enumerate(lines, start=1) if not line.strip()), None):
            raise DataError(f"{source}, line {blank}: prompt is empty; write a question, or take the line out")
        return [(f"{source}, line {number}", {"prompt": line}) for number, line in enumerate(lines, start=1)]
    if path.suffix.lower() != ".jsonl":
        raise DataError(f"{flag} {source}: expected a .txt or a .jsonl")
    rows = [(f"{source}, {where}", row) for where, row in read_jsonl(path)]
    for where, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected an object of columns, found {describe_type(row)}")
    return rows


def question(where: str, row: Any, template: Template) -> Row:
    """Check the row of a question.

    The row has the template's columns; or `prompt`, which fills the template's first column, optionally with `input`;
    or `messages`, a conversation whose last message is the question.

    Raises:
        DataError: The row is not an object, a column is missing or not a text, the messages are malformed, or the
            template cannot express them.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object of columns, found {describe_type(row)}")
    if "messages" in row and "messages" not in template.fields:
        return _conversation_question(where, row, template)
    if "prompt" not in row or "prompt" in template.fields:
        return _texts(where, row, template.fields or ("instruction", "input"), template.optional_fields)
    given = _texts(where, row, ("prompt", "input"), frozenset({"input"}))
    if not (given["prompt"].strip() or given["input"].strip()):
        raise DataError(f"{where}: prompt is empty; write a question")
    try:
        return template.row(given["prompt"], None if row.get("input") is None else given["input"])
    except ConfigError as error:
        raise DataError(f"{where}: {error}") from None


def question_of_row(where: str, row: Any, template: Template, columns: Mapping[str, str]) -> Row:
    """Check the question of a row of a dataset, whose answer, if it has one, is left out.

    Args:
        columns: The dataset's column name for each of the template's columns.

    Raises:
        DataError: See `question`.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object of columns, found {describe_type(row)}")
    row = _renamed(row, columns)
    name = _conversation_in(row) if template.spec == CHAT and "instruction" not in columns else None
    if name is None and isinstance(row.get("prompt"), list):
        name = "prompt"
    if name is None or name in template.fields:
        return question(where, row, template)
    said = messages(where, name, row[name], 1, False)
    while said and said[-1]["role"] == "assistant":
        said.pop()
    return question(where, {"messages": said, **_tools(where, row)}, template)


def _conversation_question(where: str, row: Row, template: Template) -> Row:
    """Check a conversation whose last message is the question."""
    asked = _conversation(where, "messages", row, least=1, ends_with_answer=False)
    roles = [message["role"] for message in asked["messages"]]
    if template.spec == CHAT and roles[-1] == "assistant":
        raise DataError(f"{where}: messages must end with the question, not with an answer of the assistant")
    if template.spec != CHAT and roles != (["user", "assistant"] * len(roles))[: len(roles) // 2 * 2 + 1]:
        found = ", ".join(roles)
        raise DataError(
            f"{where}: the roles of messages must alternate, begin with user and end with user, not {found:.80}"
        )
    if template.spec != CHAT and ("tools" in asked or any("tool_calls" in each for each in asked["messages"])):
        raise DataError(f"{where}: the adapter's template has no place for tools; leave tools and tool_calls out")
    return asked


def _check_mapping(source: str, row: Row, template: Template, columns: Mapping[str, str]) -> None:
    ours_known = (*template.fields, "output") if template.spec != CHAT else CHAT_COLUMNS
    for ours, theirs in columns.items():
        if ours not in ours_known:
            raise DataError(
                f"{source}: --columns names {ours!r}, which the template does not use; it uses {', '.join(ours_known)}"
            )
        if theirs not in row:
            raise DataError(f"{source}: --columns maps {ours} to {theirs!r}, but {describe_columns(row)}")


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """Return the row with the dataset's column names replaced by the template's."""
    others = {name: value for name, value in row.items() if name not in columns.values()}
    return {**others, **{ours: row[theirs] for ours, theirs in columns.items() if theirs in row}}


def check_fields(where: str, row: Row, template: Template, columns: Mapping[str, str] = MappingProxyType({})) -> Row:
    """Keep only the columns that are used, and check their types.

    A row for a chat template may have several forms (a conversation, prompt and completion, instruction and output).
    The form whose columns `columns` names is used, else the first form that the row has.
    """
    if template.spec == CHAT and not {"instruction", "input", "output"} & columns.keys():
        if "prompt" not in columns and (name := _conversation_in(row)):
            return _conversation(where, name, row, least=2, ends_with_answer=True)
        if "prompt" in row:
            return {
                "prompt": _text_or_messages(where, row, "prompt"),
                "completion": _text_or_messages(where, row, "completion", ends_with_answer=True),
                **_tools(where, row),
            }
    names = (*(template.fields or ("instruction", "input")), "output")
    return _texts(where, row, names, template.optional_fields, lambda: _missing_hint(row, names, template))


def _missing_hint(row: Row, names: Sequence[str], template: Template) -> str:
    """Return a clause that says what to do about the columns `names` that a row lacks."""
    if template.spec != CHAT and (_conversation_in(row) or {"prompt", "completion"} <= row.keys()):
        return " (the row holds a conversation; train with --template chat on such rows)"
    return columns_hint([n for n in names if n not in row and n not in template.optional_fields], row, names)


def _conversation_in(row: Row) -> str | None:
    """Return the name of the column that holds a conversation; None if there is none. A column `messages` is returned
    whatever its type, so that a wrong type is refused later."""
    return next(
        (name for name in CONVERSATIONS if name in row and (name == "messages" or isinstance(row[name], list | dict))),
        None,
    )


def _conversation(where: str, name: str, row: Row, least: int, ends_with_answer: bool) -> Row:
    said = messages(where, name, row[name], least, ends_with_answer)
    if name != "messages" and is_text(row.get("system")) and row["system"].strip() and said[0]["role"] != "system":
        said = [{"role": "system", "content": row["system"]}, *said]  # ShareGPT's datasets may have this column
    return {"messages": said, **_tools(where, row)}


def _tools(where: str, row: Row) -> Row:
    return {"tools": found} if (found := tools(where, row.get("tools"))) else {}


def _texts(
    where: str, row: Row, names: Sequence[str], optional: frozenset[str], hint: Callable[[], str] = lambda: ""
) -> Row:
    checked = {}
    for name in names:
        value = row.get(name)
        if value is None and name in optional:
            value = ""
        if not is_text(value):
            found = f"found {describe_type(value)}"
            if name not in row:
                found = f"but there is none{hint()}; {describe_columns(row)}"
            raise DataError(f"{where}: column {name!r} must be a text, {found}")
        checked[name] = value
    return checked


def _text_or_messages(where: str, row: Row, name: str, ends_with_answer: bool = False) -> Any:
    value = row.get(name)
    return value if is_text(value) else messages(where, name, value, 1, ends_with_answer)
