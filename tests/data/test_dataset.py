"""Reading rows and questions: what is legal in a file, and the line, row and column that each fault names."""

import json
import time
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from softprompt.data.dataset import load_prompts, load_rows, question
from softprompt.data.template import Template
from softprompt.utils.errors import ConfigError, DataError

GOOD = {"instruction": "问", "input": "", "output": "答"}
DEFAULT, CHAT = Template(), Template("chat")


def lines(*rows: object) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def csv(*texts: str) -> bytes:
    return "\n".join(texts).encode()


# ruff: noqa: E501 (a table reads best with a case a line)
LEGAL = {
    "an empty answer": ("r.jsonl", lines({**GOOD, "output": ""}), {**GOOD, "output": ""}),
    "an empty question": ("r.jsonl", lines({**GOOD, "instruction": ""}), {**GOOD, "instruction": ""}),
    "no input": ("r.jsonl", lines({"instruction": "问", "output": "答"}), GOOD),
    "input null": ("r.json", lines([{**GOOD, "input": None}]), GOOD),
    "columns of no use": ("r.jsonl", lines({**GOOD, "id": 7, "more": [{}]}), GOOD),
    "another order": ("r.jsonl", lines(dict(reversed(GOOD.items()))), GOOD),
    "byte order mark": ("r.json", b"\xef\xbb\xbf" + lines([GOOD]), GOOD),
    "byte order mark in a csv": ("r.csv", b"\xef\xbb\xbf" + csv("instruction,output", "问,答"), GOOD),
    "CRLF": ("r.jsonl", lines(GOOD) + b"\r\n\r\n", GOOD),
    "CRLF in a csv": ("r.csv", b"instruction,output\r\n" + "问,答\r\n".encode(), GOOD),
    "lines in a .json": ("r.json", lines(GOOD), GOOD),
    "an indented .json": ("r.json", json.dumps([GOOD], indent=2).encode(), GOOD),
    "suffix in capitals": ("r.JSONL", lines(GOOD), GOOD),
    "line separators": ("r.jsonl", lines({**GOOD, "output": "a\u2028\u2029\x85b"}), {**GOOD, "output": "a\u2028\u2029\x85b"}),
    "a whole surrogate pair": ("r.jsonl", b'{"instruction": "\\ud83d\\ude00", "output": "a"}', {**GOOD, "instruction": "😀", "output": "a"}),
    "a break in a csv field": ("r.csv", csv("instruction,output", '"a', 'b","c"""'), {**GOOD, "instruction": "a\nb", "output": 'c"'}),
    "words that readers guess at": ("r.csv", csv("instruction,output", "007,NA"), {**GOOD, "instruction": "007", "output": "NA"}),
    "blank lines in a csv": ("r.csv", csv("instruction,output", "", "问,答", ""), GOOD),
    "a long csv field": ("r.csv", csv("instruction,output", "a" * 200_000 + ",b"), {**GOOD, "instruction": "a" * 200_000, "output": "b"}),
}  # fmt: skip


@pytest.mark.parametrize("case", LEGAL)
def test_legal_files(case, tmp_path):
    name, content, row = LEGAL[case]
    (tmp_path / name).write_bytes(content)
    assert load_rows(str(tmp_path / name), DEFAULT, {}) == [row]


FAULTY = {
    "missing": ("r.csv", None, "r.csv: no such file"),
    "empty": ("r.csv", b"", "r.csv is empty; expected at least one row"),
    "a byte order mark alone": ("r.json", b"\xef\xbb\xbf", "r.json is empty"),
    "blank": ("r.jsonl", b"\r\n \t\n", "r.jsonl is empty"),
    "empty list": ("r.json", b"[ ]", "r.json holds no rows; expected at least one"),
    "a csv's header alone": ("r.csv", b"instruction,output\n", "r.csv holds no rows"),
    "not JSON": ("r.jsonl", b"hello", "r.jsonl, line 1: not JSON: Expecting value; expected one object a line"),
    "a broken line": ("r.jsonl", lines(GOOD) + b'\n\n{"a": \n' + lines(GOOD), "r.jsonl, line 3: not JSON"),
    "a list that breaks off": ("r.json", b"[\n" + lines(GOOD) + b",\n", "r.json, line 3: not JSON: Expecting value; expected a list of objects"),
    "an indented object": ("r.json", json.dumps({"data": [GOOD]}, indent=1).encode(), "r.json, line 1: not JSON: .*; expected a list of objects, or one object a line"),
    "nested deeply": ("r.json", b"[" * 100_000, "r.json, line 1: nested too deeply"),
    "an endless number": ("r.jsonl", b"1" * 5000, "r.jsonl, line 1: Exceeds the limit"),
    "a line that is a text": ("r.jsonl", lines(GOOD, "a"), "r.jsonl, line 2: expected an object of columns, found a text"),
    "a row that is a list": ("r.json", lines([GOOD, [GOOD]]), "r.json, row 2: expected an object of columns, found a list"),
    "a row that is null": ("r.json", lines([None]), "r.json, row 1: expected an object of columns, found null"),
    "no answer": ("r.jsonl", lines(GOOD, {"instruction": "a"}), "r.jsonl, line 2: column 'output' must be a text, but there is none .--columns output=THEIRS names another column"),
    "no question": ("r.json", lines([{"output": "a"}]), "r.json, row 1: column 'instruction' must be a text, but there is none"),
    "answer null": ("r.jsonl", lines({**GOOD, "output": None}), "line 1: column 'output' must be a text, found null"),
    "answer a number": ("r.jsonl", lines({**GOOD, "output": 3.5}), "line 1: column 'output' must be a text, found a number"),
    "answer true": ("r.jsonl", lines({**GOOD, "output": True}), "line 1: column 'output' must be a text, found true/false"),
    "answer a list": ("r.jsonl", lines({**GOOD, "output": ["a"]}), "line 1: column 'output' must be a text, found a list"),
    "answer an object": ("r.jsonl", lines({**GOOD, "output": {}}), "line 1: column 'output' must be a text, found an object"),
    "input a number": ("r.jsonl", lines(GOOD, {**GOOD, "input": 0}), "line 2: column 'input' must be a text, found a number"),
    "half a character": ("r.jsonl", b'{"instruction": "\\ud83d", "output": "a"}', "line 1: column 'instruction' must be a text, found half a character"),
    "GBK": ("r.jsonl", lines(GOOD, GOOD) + "\n问".encode("gbk"), r"r.jsonl, line 3: not UTF-8; save the file as UTF-8 \(iconv"),
    "UTF-16": ("r.csv", "instruction,output\n问,答".encode("utf-16"), "r.csv, line 1: not UTF-8"),
    "csv with a field too many": ("r.csv", csv("instruction,output", "a,b", "a,b,c,d"), "r.csv, line 3: 4 fields where the header names 2"),
    "csv with a field too few": ("r.csv", csv("instruction,input,output", "a,b"), "r.csv, line 2: 2 fields where the header names 3"),
    "csv with a break in a field": ("r.csv", csv("instruction,output", "", '"a', 'b",c', '"d', 'e"'), "r.csv, line 5: 1 fields where the header names 2"),
    "csv with a stray quote": ("r.csv", csv("instruction,output", "a,b", '"a"b,c'), "r.csv, line 3: not CSV"),
    "csv with an open quote in its header": ("r.csv", csv('"instruction,output', "a,b"), "r.csv, line 1: not CSV"),
    "csv without a column": ("r.csv", csv("question,output", "a,b"), "r.csv, line 2: column 'instruction' must be a text, but there is none"),
    "csv with other columns": ("r.csv", csv("id,Question,answer", "1,a,b"), "--columns instruction=Question,output=answer names .*; the columns are 'id', 'Question', 'answer'"),
    "json with other columns": ("r.json", lines([{"review": "a", "stars": "5"}]), "--columns instruction=review,output=THEIRS names .*; the columns are 'review', 'stars'"),
    "csv with semicolons": ("r.csv", csv("instruction;output", "a;b"), "r.csv, line 1: columns are separated by ';'; save the file with commas"),
    "csv with an open quote": ("r.csv", csv("instruction,output", '"a,b', "c,d"), "r.csv, line 2: not CSV: unexpected end of data"),
    "another suffix": ("r.txt", b"a", "r.txt: expected a file ending in .json, .jsonl, .csv, .parquet, a folder of such files, or one of Dataset.save_to_disk"),
    "no suffix": ("r", b"a", "r: expected a file ending in .json"),
    "not parquet": ("r.parquet", lines(GOOD), "r.parquet: not a parquet file: "),
    "an empty .parquet": ("r.parquet", b"", "r.parquet: not a parquet file: "),
}  # fmt: skip


def fault(call, *args, **kwargs) -> str:
    with pytest.raises((DataError, ConfigError)) as raised:
        call(*args, **kwargs)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("case", FAULTY)
def test_faulty_files(case, tmp_path):
    name, content, message = FAULTY[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    found = fault(load_rows, str(tmp_path / name), DEFAULT, {})
    assert found.startswith(f"{tmp_path}/")
    with pytest.raises(DataError, match=message):
        raise DataError(found)


def save_parquet(path: Path, columns: dict[str, list]) -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.table(columns), path)


def save_folder(path: Path, columns: dict[str, list]) -> None:
    Dataset.from_dict(columns).save_to_disk(path)


def save_splits(path: Path, columns: dict[str, list]) -> None:
    DatasetDict({"train": Dataset.from_dict(columns)}).save_to_disk(path)


@pytest.mark.parametrize("save", [save_parquet, save_folder, save_splits])
@pytest.mark.parametrize(
    "columns, message",
    [
        ({"instruction": ["a", "b"], "output": ["c", None]}, ", row 2: column 'output' must be a text, found null"),
        ({"instruction": ["a"], "output": [1]}, ", row 1: column 'output' must be a text, found a number"),
        ({"instruction": ["a"]}, ", row 1: column 'output' must be a text, but there is none"),
        (
            {"question": ["a"], "label": ["b"]},
            ", row 1: column 'instruction' must be a text, but there is none (--columns instruction=question,output=label "
            "names other columns); the columns are 'question', 'label'",
        ),
        ({"instruction": [], "output": []}, " holds no rows"),
    ],
    ids=["null", "number", "column", "names", "rows"],
)
def test_faulty_tables(save, columns, message, tmp_path, capfd):
    path = tmp_path / "r.parquet"
    if save is not save_parquet and message == " holds no rows":
        message = ": expected a folder of Dataset.save_to_disk that holds rows"  # datasets does not load what it saved
    save(path, columns)
    capfd.readouterr()
    assert fault(load_rows, str(path), DEFAULT, {}).startswith(f"{path}{message}")
    assert capfd.readouterr() == ("", "")  # no bar beside the one line


def test_a_parquet_file_that_breaks_off(tmp_path):
    save_parquet(tmp_path / "r.parquet", {"instruction": ["a"] * 100, "output": ["b"] * 100})
    whole = (tmp_path / "r.parquet").read_bytes()
    (tmp_path / "r.parquet").write_bytes(whole[: len(whole) // 2])
    assert "r.parquet: not a parquet file: " in fault(load_rows, str(tmp_path / "r.parquet"), DEFAULT, {})


@pytest.mark.parametrize("files", [[], ["state.json"], ["rows.txt"]], ids=str)
def test_folders_that_are_no_dataset(files, tmp_path):
    for name in files:
        (tmp_path / name).write_bytes(b"{}")
    assert fault(load_rows, str(tmp_path), DEFAULT, {}).startswith(f"{tmp_path}: expected a folder of Dataset.save_to")


@pytest.mark.parametrize("source", ["./nothing", "/nothing", "~/rows", "a/b/c"])
def test_what_looks_like_a_path_is_not_sought_on_the_hub(source):
    assert fault(load_rows, source, DEFAULT, {}).startswith(f"{source}: no such file or folder; ")


@pytest.mark.parametrize("source", ["some/rows", "alpaca_data_zh"])
def test_a_hub_id_without_a_network(source, monkeypatch):
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    began = time.monotonic()
    found = fault(load_rows, source, DEFAULT, {})
    assert found.startswith(f"dataset '{source}': no such file or folder here, and not loadable from the hub")
    assert "name a local folder or file, or run the default preset" in found
    assert time.monotonic() - began < 20


def test_columns_take_other_names(tmp_path):
    (tmp_path / "r.jsonl").write_bytes(lines({"q": "a", "instruction": "not this", "output": "b", "about": "c"}))
    source = str(tmp_path / "r.jsonl")
    rows = load_rows(source, DEFAULT, {"instruction": "q", "input": "about"})
    assert rows == [{"instruction": "a", "input": "c", "output": "b"}]
    swapped = load_rows(source, DEFAULT, {"instruction": "output", "output": "instruction"})
    assert swapped == [{"instruction": "b", "input": "", "output": "not this"}]
    found = fault(load_rows, source, DEFAULT, {"output": "answer"})
    assert found == (
        f"{source}: --columns maps output to 'answer', but the columns are 'q', 'instruction', 'output', 'about'"
    )


MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": MESSAGES[1:]},  # an answer to nothing
        {"messages": MESSAGES[:1]},
        {"messages": []},
        {"messages": "a"},
        {"messages": [{"role": "user"}, MESSAGES[1]]},
        {"messages": [{"role": "user", "content": None}, MESSAGES[1]]},
        {"prompt": "a"},
        {"prompt": [], "completion": "b"},
        {"prompt": 3, "completion": "b"},
        {"prompt": "a", "completion": MESSAGES[:1]},
        {"prompt": "a", "completion": ["b"]},
        {"question": "a"},
    ],
    ids=str,
)
def test_faulty_chat_rows(row, tmp_path):
    (tmp_path / "r.jsonl").write_bytes(lines({"messages": MESSAGES}, row))
    found = fault(load_rows, str(tmp_path / "r.jsonl"), CHAT, {})
    assert found.startswith(f"{tmp_path}/r.jsonl, line 2: ")
    assert any(f"'{name}'" in found for name in ("messages", "prompt", "completion", "instruction"))


def questions_of(file, spec):
    """As infer.py reads them: each line by itself, then in the template of its adapter."""
    return [question(where, row, Template(spec)) for where, row in load_prompts(str(file))]


def test_a_text_file_has_a_question_a_line(tmp_path):
    (tmp_path / "q.TXT").write_bytes("\ufeff你好\u2028吗\r\n  a b\n \r\n\n".encode())
    assert [where[-6:] for where, _ in load_prompts(str(tmp_path / "q.TXT"))] == ["line 1", "line 2"]
    assert questions_of(tmp_path / "q.TXT", "Q: {text}") == [{"text": "你好\u2028吗"}, {"text": "  a b"}]


@pytest.mark.parametrize(
    "spec, row, expected",
    [
        ("default", {"prompt": "a"}, {"instruction": "a", "input": ""}),
        ("default", {"prompt": "a", "input": "b", "id": 3}, {"instruction": "a", "input": "b"}),
        ("default", {"instruction": "a", "input": None}, {"instruction": "a", "input": ""}),
        ("{prompt}:", {"prompt": "a"}, {"prompt": "a"}),
        ("{x}{y}{z}", {"x": "a", "y": "b", "z": "c"}, {"x": "a", "y": "b", "z": "c"}),
        ("{x}{y}", {"prompt": "a", "input": "b"}, {"x": "a", "y": "b"}),
        ("chat", {"prompt": "a"}, {"instruction": "a", "input": ""}),
    ],
)
def test_a_question_as_a_row(spec, row, expected, tmp_path):
    (tmp_path / "q.jsonl").write_bytes(lines(row))
    assert questions_of(tmp_path / "q.jsonl", spec) == [expected]


QUESTIONS = {
    "missing": ("q.txt", None, "default", "--prompts_file .*q.txt: no such file"),
    "a folder": (".", None, "default", "is a folder; name a .txt or a .jsonl in it"),
    "another kind": ("q.csv", b"a", "default", "--prompts_file .*q.csv: expected a .txt or a .jsonl"),
    "empty": ("q.txt", b"\n", "default", "q.txt is empty"),
    "not UTF-8": ("q.txt", "问\n".encode("gbk"), "default", "q.txt, line 1: not UTF-8"),
    "not JSON": ("q.jsonl", lines({"prompt": "a"}) + b"\n{", "default", "q.jsonl, line 2: not JSON"),
    "no object": ("q.jsonl", b'"a"', "default", "q.jsonl, line 1: expected an object of columns, found a text"),
    "no question": ("q.jsonl", lines({"text": "a"}), "default", "line 1: column 'instruction' must be a text, but there is none; the columns are 'text'$"),
    "prompt a number": ("q.jsonl", lines({"prompt": 3}), "default", "line 1: column 'prompt' must be a text, found a number$"),
    "input a list": ("q.jsonl", lines({"prompt": "a", "input": []}), "default", "line 1: column 'input' .* a list$"),
    "no place for input": ("q.jsonl", lines({"prompt": "a", "input": "b"}), "{x}", "line 1: --input: the adapter's template has no column for it, only x"),
    "a column unfilled": ("q.jsonl", lines({"prompt": "a"}), "{x}{y}", "line 1: the template has the columns x, y; y would be empty"),
    "columns unfilled": ("q.txt", b"a", "{x}{y}{z}", "the template has the columns x, y, z; y, z would be empty"),
}  # fmt: skip


@pytest.mark.parametrize("case", QUESTIONS)
def test_faulty_questions(case, tmp_path):
    name, content, spec, message = QUESTIONS[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((DataError, ConfigError), match=message):
        questions_of(tmp_path / name, spec)


def test_a_question_from_python_is_checked_too():
    assert fault(question, "question", ["a"], DEFAULT) == "question: expected an object of columns, found a list"
