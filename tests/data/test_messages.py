"""Conversations in the forms that datasets have: what they say reaches the chat template, or the row is refused by name;
and columns of any name."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from helpers.bases import make_tokenizer

import softprompt
from softprompt.config.loader import train_config
from softprompt.config.value_parsers import parse_columns
from softprompt.data.chat_template import ignored_keys
from softprompt.data.dataset import load_rows, question
from softprompt.data.encoding import encode
from softprompt.data.template import Template
from softprompt.data.tokenization import tokenize
from softprompt.generation.encode_questions import encode_question
from softprompt.utils.errors import ConfigError, DataError

CHAT = Template("chat")
PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WITH_TOOLS = (
    "{% if tools %}<tools>{{ tools | tojson }}\n{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ (c.function or c).name }} {{ (c.function or c).arguments | tojson }}]"
    "{% endfor %}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def templated(chat_template: str):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = chat_template
    return tokenizer


def save(path: Path, *rows: dict) -> str:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return str(path)


def text_of(path: Path, row: dict, chat_template: str = PLAIN, **columns: str) -> str:
    """What a row becomes, prompt and answer."""
    tokenizer = templated(chat_template)
    rows = load_rows(save(path, row), CHAT, columns)
    return tokenizer.decode(tokenize(rows, tokenizer, CHAT, 400).examples[0].input_ids)


Q, A = {"role": "user", "content": "你好"}, {"role": "assistant", "content": "再见"}
SAID = "<user>你好</s>\n<assistant>再见</s>"
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "x"}'}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOOLS = [{"type": "function", "function": {"name": "weather"}}]

# ruff: noqa: E501 (a table reads best with a case a line)
FORMS = {
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]}, A]}, SAID),
    "texts as parts": ({"messages": [Q, {"role": "assistant", "content": ["再", "见"]}]}, SAID),
    "a list a key": ({"messages": {"role": ["user", "assistant"], "content": ["你好", "再见"]}}, SAID),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "再见"}]}, SAID),
    "ShareGPT with a list a key": ({"conversations": {"from": ["human", "gpt"], "value": ["你好", "再见"]}}, SAID),
    "ShareGPT in messages": ({"messages": [{"from": "user", "value": "你好"}, {"from": "assistant", "value": "再见"}]}, SAID),
    "ShareGPT with a system column": ({"system": "x", "conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "再见"}]}, "<system>x</s>\n" + SAID),
    "an answer of a tool": ({"messages": [Q, {**CALLS, "tool_calls": []}, {"role": "tool", "content": "晴"}, A]}, "<user>你好</s>\n<assistant></s>\n<tool>晴</s>\n<assistant>再见</s>"),
    "nulls of a parquet file": ({"messages": [{**Q, "tool_calls": None, "name": None}, {**A, "tool_calls": None}], "tools": None}, SAID),
    "no tools": ({"messages": [Q, A], "tools": []}, SAID),
    "tools in an empty text": ({"messages": [Q, A], "tools": ""}, SAID),
    "prompt and completion": ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "你好"}]}], "completion": [A]}, SAID),
    "a text named conversation": ({"conversation": "x", "instruction": "你好", "output": "再见"}, SAID),
}  # fmt: skip


@pytest.mark.parametrize("case", FORMS)
def test_forms_of_conversations(case, tmp_path):
    row, expected = FORMS[case]
    assert text_of(tmp_path / "r.jsonl", row) == expected


@pytest.mark.parametrize("arguments", ['{"city": "x"}', {"city": "x"}], ids=["text", "object"])
@pytest.mark.parametrize("bare", [False, True], ids=["function", "bare"])
@pytest.mark.parametrize("as_text", [False, True], ids=["tools", "tools as a text"])
def test_tools_and_calls_reach_the_chat_template(arguments, bare, as_text, tmp_path):
    call = {"name": "weather", "arguments": arguments}
    row = {
        "messages": [Q, {**CALLS, "tool_calls": [call if bare else {"type": "function", "function": call}]}],
        "tools": json.dumps(TOOLS) if as_text else TOOLS,
    }
    expected = f'<tools>{json.dumps(TOOLS)}\n<user>你好</s>\n<assistant>[weather {{"city": "x"}}]</s>'
    assert text_of(tmp_path / "r.jsonl", row, WITH_TOOLS) == expected
    (tokenizer, rows) = templated(WITH_TOOLS), load_rows(str(tmp_path / "r.jsonl"), CHAT, {})
    (found,) = encode(rows, ["row 1"], tokenizer, CHAT, 400, "output")
    assert not found.empty and "weather" in tokenizer.decode([label for label in found.example.labels if label != -100])
    asked = {"messages": [Q, row["messages"][1], {"role": "tool", "content": "晴"}], "tools": row["tools"]}
    text = tokenizer.decode(encode_question("q", asked, CHAT, tokenizer)[1])
    assert text == expected + "\n<tool>晴</s>\n<assistant>"


def test_tools_that_the_chat_template_does_not_write_are_refused(tmp_path):
    for row, what in [
        ({"messages": [Q, CALLS]}, "tool_calls"),
        ({"messages": [Q, CALLS, {"role": "tool", "content": "晴"}, A]}, "tool_calls"),
        ({"messages": [Q, A], "tools": TOOLS}, "tools"),
        ({"prompt": "你好", "completion": "再见", "tools": TOOLS}, "tools"),
    ]:
        with pytest.raises(DataError, match=f"row 1: the tokenizer's chat template writes no {what}; take them out"):
            text_of(tmp_path / "r.jsonl", row)
    with pytest.raises(DataError, match="writes no tools"):
        encode_question("q", {"messages": [Q], "tools": TOOLS}, CHAT, templated(PLAIN))[1]
    with pytest.raises(DataError, match="no place for tools"):
        question("q", {"messages": [Q], "tools": TOOLS}, Template())


REFUSED = {
    "an answer of nothing": ({"messages": [Q, {"role": "assistant", "content": None}]}, "'messages', message 2: its content must be a text, .* found null"),
    "an answer without calls": ({"messages": [Q, {**CALLS, "tool_calls": []}]}, "message 2: its content must be a text"),
    "a question of nothing": ({"messages": [{"role": "user", "content": None}, A]}, "message 1: its content must be a text"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, A]}, "message 1: .* list of text parts, found a part of type 'image'"),
    "a number": ({"messages": [{"role": "user", "content": 3}, A]}, "message 1: its content must be a text, .* found a number"),
    "an unknown sender": ({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "b"}]}, "'conversations', message 2 is from 'function_call'; expected one of human"),
    "no answer": ({"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]}, "ends with the assistant's, .* its role is 'user'"),
    "lists of two lengths": ({"messages": {"role": ["user", "assistant"], "content": ["a"]}}, "'messages' must be a list"),
    "calls that are none": ({"messages": [Q, {**CALLS, "tool_calls": "x"}]}, "message 2: its tool_calls must be a list of objects"),
    "tools that are none": ({"messages": [Q, A], "tools": "x"}, "'tools' must be a list of objects"),
    "other keys": ({"messages": [{"speaker": "user", "text": "a"}, A]}, r"message 1 must have a text for its 'role' \(or 'from'\); its keys are speaker, text"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_conversations_that_are_refused_by_name(case, tmp_path):
    row, message = REFUSED[case]
    with pytest.raises(DataError, match=rf"r.jsonl, line 1: .*{message}"):
        text_of(tmp_path / "r.jsonl", row)


@pytest.mark.parametrize(
    "row", [{"messages": [Q, A]}, FORMS["ShareGPT"][0], {"prompt": "a", "completion": "b"}], ids="+".join
)
def test_rows_for_a_chat_template_say_so(row, tmp_path):
    with pytest.raises(DataError, match=r"there is none .*--template chat"):
        load_rows(save(tmp_path / "r.jsonl", row), Template(), {})


def test_a_question_ends_with_what_is_asked():
    with pytest.raises(DataError, match="q: messages must end with the question"):
        question("q", {"messages": [Q, A]}, CHAT)


def test_messages_of_a_parquet_file(tmp_path):
    """In which every message has the keys of all."""
    said = [{**Q, "name": "x"}, {**A, "weight": 1}]
    Dataset.from_list([{"messages": said}] * 2).to_parquet(tmp_path / "r.parquet")
    rows = load_rows(str(tmp_path / "r.parquet"), CHAT, {})
    assert rows == [{"messages": said}] * 2
    assert ignored_keys(rows, templated(PLAIN)) == {"name": 2, "weight": 2}
    assert ignored_keys(rows, templated(PLAIN + "{{ messages[0].name }}")) == {"weight": 2}


def test_what_the_chat_template_does_not_read_is_said(tiny_base, tmp_path, capsys):
    import shutil

    shutil.copytree(tiny_base, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text(PLAIN)
    settings = {"model_name_or_path": str(tmp_path / "base"), "template": "chat", "max_steps": 1}
    dataset = save(tmp_path / "r.jsonl", {"messages": [Q, {**A, "weight": 0}]}, {"messages": [Q, A | {"content": ""}]})
    softprompt.train(**settings, dataset=dataset, output_dir=str(tmp_path / "run"))
    told = capsys.readouterr().out
    assert "does not read: weight (in 1 rows)" in told
    assert "1 rows with an empty answer" in told  # whatever the template writes behind it


NAMES = [
    "prompt",
    "messages",
    "a b",
    " a",
    "a=b",
    "1",
    "None",
    "输出",
    "a,b",
    '"q"',
    "{x}",
    "",
    "conversations",
    "completion",
]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "saved"])
@pytest.mark.parametrize("name", NAMES)
def test_columns_may_have_any_name(name, kind, tmp_path):
    import csv

    row, path = {name: "你好", "to": "再见", "instruction": "x"}, tmp_path / f"r.{kind}"
    if kind == "jsonl":
        save(path, row)
    elif kind == "csv":
        with open(path, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([row, row.values()])
    elif kind == "parquet":
        Dataset.from_list([row]).to_parquet(path)
    else:
        Dataset.from_list([row]).save_to_disk(path)
    columns = parse_columns(json.dumps({"instruction": name, "output": "to"}))
    for template in (Template(), CHAT):
        (found,) = load_rows(str(path), template, columns)
        assert found == {"instruction": "你好", "input": "", "output": "再见"}
        with pytest.raises(DataError) as raised:
            load_rows(str(path), template, {"output": "nothing"})
        assert repr(name) in str(raised.value) and "'to'" in str(raised.value)
    with pytest.raises(DataError) as raised:
        load_rows(str(path), Template(), {})
    assert repr(name) in str(raised.value)


@pytest.mark.parametrize(
    "text, found",
    [
        ("instruction=a=b, output = c d", {"instruction": "a=b", "output": "c d"}),
        ('{"instruction": "a,b", "output": " c"}', {"instruction": "a,b", "output": " c"}),
        ("output=a,output=b", None),
        ('{"output": "a", "output": "b"}', None),
        ('{"output": 3}', None),
        ('{"output": ', None),
        ('{"": "a"}', None),
        ("=a", None),
    ],
)
def test_columns_as_they_are_given(text, found):
    if found is not None:
        assert parse_columns(text) == found
    else:
        with pytest.raises(ConfigError, match="--columns"):
            train_config("mini", columns=text)


def test_a_column_of_ours_that_is_unknown_is_refused(tmp_path):
    source = save(tmp_path / "r.jsonl", {"a": "x", "output": "y", "instruction": "z"})
    for template, name in ((Template(), "outptu"), (Template("{a}"), "instruction"), (CHAT, "question")):
        with pytest.raises(DataError, match=f"--columns names '{name}', which the template does not use; it uses "):
            load_rows(source, template, {name: "a"})


TWICE = {
    "r.csv": ("instruction,output,output\na,b,c", "r.csv, line 1: the header names 'output' twice"),
    "r.jsonl": ('{"instruction": "a", "output": "b", "output": "c"}', "r.jsonl, line 1: .* the key 'output' twice"),
    "r.json": ('[{"instruction": "a", "output": "b", "output": "c"}]', "r.json, line 1: .* the key 'output' twice"),
}


@pytest.mark.parametrize("name", TWICE)
def test_of_two_columns_of_one_name_none_is_dropped(name, tmp_path):
    content, message = TWICE[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_rows(str(tmp_path / name), Template(), {})


def test_two_columns_of_one_name_in_a_parquet_file(tmp_path):
    import pyarrow
    from pyarrow.parquet import write_table

    columns = [pyarrow.array([text]) for text in "abc"]
    write_table(pyarrow.Table.from_arrays(columns, names=["instruction", "output", "output"]), tmp_path / "r.parquet")
    with pytest.raises(DataError, match=r"r.parquet: two columns are named 'output'"):
        load_rows(str(tmp_path / "r.parquet"), Template(), {})


def test_commas_at_the_ends_of_lines_are_no_columns(tmp_path):
    (tmp_path / "r.csv").write_text("instruction,output,,\na,b,,\n")
    assert load_rows(str(tmp_path / "r.csv"), Template(), {}) == [{"instruction": "a", "input": "", "output": "b"}]


@pytest.mark.parametrize("text", ["007", "2024-01-02", "NA", "null", "true", "1e5", " a ", "nan", "3.0", "None", "\t"])
def test_text_in_a_row_stays_text(text, tmp_path):
    """In every place that rows are read from."""
    row = {"instruction": text, "input": text, "output": text}
    (tmp_path / "r.csv").write_text(f"instruction,input,output\n{text},{text},{text}\n")
    (tmp_path / "r.json").write_text(json.dumps([row]))
    (tmp_path / "d").mkdir()
    save(tmp_path / "r.jsonl", row)
    (tmp_path / "d" / "train.csv").write_bytes((tmp_path / "r.csv").read_bytes())
    Dataset.from_list([row]).to_parquet(tmp_path / "r.parquet")
    Dataset.from_list([row]).save_to_disk(tmp_path / "saved")
    for name in ("r.csv", "r.json", "r.jsonl", "d", "r.parquet", "saved"):
        assert load_rows(str(tmp_path / name), Template(), {}) == [row], name


def test_the_longest_text_of_a_template_s_own_columns_is_cut(tokenizer):
    row = {"completion": "abc " * 50, "output": "好"}
    (found,) = tokenize([row], tokenizer, Template("{completion}:"), 20, "input").examples
    assert len(found.input_ids) <= 20 and tokenizer.decode(found.input_ids).endswith(":好</s>")
