"""From files to token ids: readers, columns, templates, labels and cuts, order and padding."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from helpers.peers import collated, random_examples
from hypothesis import given
from hypothesis import strategies as st
from transformers import DataCollatorForSeq2Seq

from softprompt.data.chat_template import answer_message, prompt_messages
from softprompt.data.dataset import load_prompts, load_rows, question
from softprompt.data.encoding import passages
from softprompt.data.sampler import steps_per_epoch, windows
from softprompt.data.template import Template
from softprompt.data.tokenization import count_targets, tokenize
from softprompt.generation.encode_questions import encode_question
from softprompt.utils.errors import ConfigError, DataError

ROWS = [
    {"instruction": "翻译成英文", "input": "你好", "output": "hello"},
    {"instruction": "2024-01-02", "input": "", "output": "NA"},  # what readers that guess take for a date and for null
    {"instruction": 'a "b", c', "input": "x\ny", "output": ""},
]
QA = [{"question": row["instruction"], "input": row["input"], "answer": row["output"]} for row in ROWS]


def save_as(kind: str, folder: Path, rows: list[dict]) -> str:
    """Write `rows` as one of the kinds of dataset; returns what --dataset is given."""
    path = folder / f"rows.{kind}"
    dataset = Dataset.from_list(rows)
    if kind == "json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    elif kind == "jsonl":
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_bytes("\r\n".join(["\ufeff" + lines[0], "", *lines[1:]]).encode())
    elif kind == "csv":
        dataset.to_csv(path, index=False)
    elif kind == "parquet":
        dataset.to_parquet(path)
    elif kind == "folder":
        dataset.save_to_disk(path)
    else:
        DatasetDict({"train": dataset, "other": dataset.select([0])}).save_to_disk(path)
    return str(path)


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet", "folder", "splits"])
def test_every_kind_of_dataset_gives_the_same_rows(kind, tmp_path):
    assert load_rows(save_as(kind, tmp_path, ROWS), Template(), {}) == ROWS
    columns = {"instruction": "question", "output": "answer"}
    (tmp_path / "qa").mkdir()
    source = save_as(kind, tmp_path / "qa", QA)
    assert load_rows(source, Template(), columns) == ROWS
    named = load_rows(source, Template("Q: {question}\\nA: "), {"output": "answer"})
    assert named == [{"question": row["instruction"], "output": row["output"]} for row in ROWS]


def test_a_split_of_a_folder(tmp_path):
    source = save_as("splits", tmp_path, ROWS)
    assert len(load_rows(source, Template(), {}, split="other")) == 1
    with pytest.raises(DataError, match="no split 'test'; --dataset_split takes one of train, other"):
        load_rows(source, Template(), {}, split="test")


def test_line_separators_inside_a_text_end_no_line(tmp_path):
    row = {"instruction": "a\u2028b\x85c", "output": "d"}
    (tmp_path / "r.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert load_rows(str(tmp_path / "r.jsonl"), Template(), {}) == [{**row, "input": ""}]


def naive(row: dict, tokenizer, max_length: int) -> tuple[list[int], list[int]]:
    """The article's way with one row."""
    prompt = "\n".join(["Human: " + row["instruction"], row["input"]]).strip() + "\n\nAssistant: "
    asked = tokenizer(prompt)["input_ids"]
    answer = tokenizer(row["output"] + tokenizer.eos_token)["input_ids"]
    ids, labels = asked + answer, [-100] * len(asked) + answer
    return ids[:max_length], labels[:max_length]


texts = st.text(max_size=30).filter(lambda s: "</s>" not in s)


@given(
    st.lists(st.fixed_dictionaries({"instruction": texts, "input": texts, "output": texts}), min_size=1),
    st.integers(10, 90),
)
def test_rows_are_tokenized_as_in_the_article(rows, max_length):
    tokenizer = shared_tokenizer()
    expected = [naive(row, tokenizer, max_length) for row in rows]
    with_target = [pair for pair in expected if set(pair[1]) != {-100}]
    if not with_target:
        with pytest.raises(DataError, match="no row keeps a target"):
            tokenize(rows, tokenizer, Template(), max_length)
        return
    found = tokenize(rows, tokenizer, Template(), max_length)
    assert [tuple(example) for example in found.examples] == with_target
    assert found.rows == len(rows) and found.without_target == len(rows) - len(with_target)
    assert found.empty_answers == sum(row["output"] == "" for row in rows)
    assert found.cut == sum(len(naive(row, tokenizer, 10**6)[0]) > max_length for row in rows)


def shared_tokenizer(made: list = []):  # noqa: B006 (made once; a fixture would be made anew for every example)
    from helpers.bases import make_tokenizer

    made or made.append(make_tokenizer())
    return made[0]


@pytest.mark.parametrize("longest", ["instruction", "input"])
def test_cutting_the_input_keeps_the_answer(longest, tokenizer):
    row = {"instruction": "读一读", "input": "x", "output": "很好看", longest: "abcdefgh " * 40}
    fine = {"instruction": "a", "input": "", "output": "b"}
    found = tokenize([row, fine], tokenizer, Template(), 64, "input")
    answer = tokenizer(row["output"] + tokenizer.eos_token)["input_ids"]
    cut = found.examples[0]
    assert cut.input_ids[-len(answer) :] == answer and count_targets(cut) == len(answer)
    assert 64 - 3 <= len(cut.input_ids) <= 64  # no shorter than it must be
    assert tokenizer.decode(cut.input_ids).startswith("Human: ") and "\n\nAssistant: " in tokenizer.decode(
        cut.input_ids
    )
    assert (found.cut, found.without_target) == (1, 0)
    assert tuple(found.examples[1]) == naive(fine, tokenizer, 64)


@given(
    st.lists(st.fixed_dictionaries({"instruction": texts, "input": texts, "output": texts}), min_size=1, max_size=4),
    st.integers(2, 90),
)
def test_cutting_the_input_whatever_the_row(rows, max_length):
    """The answer is whole where it can be, no row is too long, and what fits is left as it is."""
    tokenizer = shared_tokenizer()
    frame = len(naive({"instruction": "", "input": "", "output": ""}, tokenizer, 10**6)[0]) - 1
    for row in rows:
        answer = tokenizer(row["output"] + tokenizer.eos_token)["input_ids"]
        try:
            (found,) = tokenize([row], tokenizer, Template(), max_length, "input").examples
        except DataError:
            assert frame >= max_length
            continue
        whole = naive(row, tokenizer, 10**6)
        targets = [label for label in found.labels if label != -100]
        assert len(found.input_ids) <= max_length and found.input_ids[-len(targets) :] == targets
        if len(whole[0]) <= max_length:
            assert tuple(found) == whole
        if frame + len(answer) <= max_length:
            assert targets == answer
        else:  # no prompt is short enough: the answer is cut after all
            assert targets == answer[: max_length - frame] and len(found.input_ids) == max_length


def test_cutting_the_input_goes_on_with_the_next_text(tokenizer):
    row = {"instruction": "abcdefgh " * 20, "input": "hgfedcba " * 30, "output": "很好看"}
    (found,) = tokenize([row], tokenizer, Template(), 64, "input").examples
    text = tokenizer.decode(found.input_ids)
    assert text.endswith("\n\nAssistant: 很好看</s>") and text.startswith("Human: abcdefgh") and "hgf" not in text
    assert 64 - 3 <= len(found.input_ids) <= 64


def adding(single: str):
    """A tokenizer that puts its begin or end token around every text by itself."""
    from helpers.bases import make_tokenizer
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[("<s>", 1), ("</s>", 2), ("<pad>", 3)]
    )
    return tokenizer


@pytest.mark.parametrize(
    "single, front", [("$A </s>", []), ("<s> $A </s>", [1]), ("<s> $A", [1]), ("<pad> $A </s> <s>", [3])]
)
def test_what_a_tokenizer_adds_behind_a_text_stands_nowhere(single, front, tmp_path):
    """Only what stands in front is kept: in training, in questions, in plain texts, and where the input is cut."""
    tokenizer, template = adding(single), Template()
    bare = dict(add_special_tokens=False)
    row = {"instruction": "</s>好" * 30, "input": "", "output": "正面"}
    question, answer = template.render(row, tokenizer), tokenizer("正面</s>", **bare)["input_ids"]
    expected = front + tokenizer(question, **bare)["input_ids"]
    assert tokenizer(question)["input_ids"] != tokenizer(question, **bare)["input_ids"]
    (found,) = tokenize([row], tokenizer, template, 400).examples
    assert found.input_ids == expected + answer and found.labels == [-100] * len(expected) + answer
    assert encode_question("a question", row["instruction"], template, tokenizer)[1] == expected
    (cut,) = tokenize([row], tokenizer, template, 64, "input").examples
    assert cut.input_ids[: len(front)] == front and cut.input_ids[-len(answer) :] == answer
    assert cut.labels.count(-100) == len(cut.input_ids) - len(answer)
    assert tokenizer.decode(cut.input_ids[: -len(answer)]).endswith("\n\nAssistant: ")
    (tmp_path / "t.txt").write_text("好好", encoding="utf-8")
    (passage,) = passages(str(tmp_path / "t.txt"), tokenizer, 99)
    assert passage.input_ids == front + tokenizer("好好", **bare)["input_ids"]


def test_what_is_cut_anyway_is_not_warned_of(caplog):
    from helpers.bases import make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 8
    tokenize([{"instruction": "a" * 90, "input": "", "output": "b"}] * 2, tokenizer, Template(), 400)
    assert not caplog.records


def test_max_length_is_advised_by_the_shortest_prompt(tokenizer):
    rows = [{"text": text, "output": "长" * 40} for text in ("abcabc" * 9, "", "abcabc" * 7)]
    template = Template("{text}:")
    with pytest.raises(DataError, match="the shortest prompt alone has 1 tokens; give --max_length 17 or more"):
        tokenize(rows, tokenizer, template, 1)
    assert tokenize(rows, tokenizer, template, 17).without_target == 2


def test_what_was_found_is_said(tokenizer):
    rows = [
        {"instruction": "a" * 300, "input": "", "output": "b"},
        {"instruction": "a", "input": "", "output": "长" * 100},
        {"instruction": "a", "input": "", "output": ""},
    ]
    said = str(tokenize(rows, tokenizer, Template(), 64))
    assert said.startswith("2 of 3 rows, ")
    for part in (
        "2 rows cut at max_length",
        "1 rows left out because their whole answer was cut",
        "1 rows with an empty answer",
    ):
        assert part in said
    with pytest.raises(DataError, match="give --max_length"):
        tokenize(rows, tokenizer, Template(), 3)


def test_a_rows_first_token_is_never_a_target(tokenizer):
    """In a padded batch what stands before it may be padding, from which nothing can be predicted."""
    row = {"text": "", "output": "ok"}
    (example,) = tokenize([row], tokenizer, Template("{text}"), 64).examples
    assert example.labels == [-100, *example.input_ids[1:]]


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TURN = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "再见"}]
CHAT_ROWS = [
    {"messages": TURN},
    {"prompt": "你好", "completion": "再见"},
    {"prompt": TURN[:1], "completion": TURN[1:]},
    {"instruction": "你好", "output": "再见"},
]


@pytest.mark.parametrize("row", CHAT_ROWS, ids=lambda row: "+".join(row))
def test_the_chat_template(row, tmp_path):
    from helpers.bases import make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    (tmp_path / "r.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    template = Template("chat")
    (example,) = tokenize(load_rows(str(tmp_path / "r.jsonl"), template, {}), tokenizer, template, 200).examples
    assert tokenizer.decode(example.input_ids) == "<user>你好</s>\n<assistant>再见</s>"
    targets = [label for label in example.labels if label != -100]
    assert tokenizer.decode(targets) == "再见</s>" and targets[-1] == tokenizer.eos_token_id
    assert template.render(template.row("你好"), tokenizer) == "<user>你好</s>\n<assistant>"


def test_all_that_was_said_before_the_answer_is_the_prompt():
    said = [*TURN, {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    one, two = {"messages": said}, {"prompt": said[:1], "completion": said[1:]}
    assert prompt_messages(one) == prompt_messages(two) == said[:-1]
    assert answer_message(one) == answer_message(two) == said[-1]


@pytest.mark.parametrize(
    "chat_template, message",
    [
        ("{% if messages[0].content == '2' %}{{ raise_exception('no') }}{% endif %}a", "row 3: .* refuses a row: no"),
        ("{{ messages | length }}", "row 1: .* does not continue its own generation prompt; give --template"),
    ],
)
def test_a_row_that_the_chat_template_refuses_is_named(chat_template, message):
    from helpers.bases import make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.chat_template = chat_template
    rows = [{"instruction": str(n), "input": "", "output": "b"} for n in range(4)]
    with pytest.raises(DataError, match=message):
        tokenize(rows, tokenizer, Template("chat"), 99)


def test_no_chat_template(tokenizer):
    with pytest.raises(ConfigError, match="--template chat: this base's tokenizer has no chat template; give a format"):
        tokenize([CHAT_ROWS[-1]], tokenizer, Template("chat"), 99)


def test_chat_rows_must_end_with_an_answer(tmp_path):
    (tmp_path / "r.jsonl").write_text(json.dumps({"messages": TURN[:1]}), encoding="utf-8")
    with pytest.raises(DataError, match=r"line 1: 'messages' must be a list .* ends with the assistant's"):
        load_rows(str(tmp_path / "r.jsonl"), Template("chat"), {})


@pytest.mark.parametrize(
    "spec", ["{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "{}", "{0}", "none", "{a", "a}", "", "{a}{output}", 3, None]
)
def test_templates_that_are_refused(spec):
    with pytest.raises(ConfigError, match=r"template .* (must be|is not|leave {output} out)"):
        Template(spec)


def test_a_format_string(tokenizer):
    row = {"问": "{a}\\n", "b": "x", "output": "y"}
    template = Template("问：{问}\\n{b}{{}}\\t{b}\n")
    assert template.fields == ("问", "b")
    assert template.render(row, tokenizer) == "问：{a}\\n\nx{}\tx\n"  # what stands in a row stays as it is
    assert template.answer(row, tokenizer) == "y</s>"


def test_a_new_question_fills_the_templates_columns(tokenizer):
    assert Template().render(Template().row("a", "b"), tokenizer) == "Human: a\nb\n\nAssistant: "
    assert Template().render(Template().row("a"), tokenizer) == "Human: a\n\nAssistant: "
    one, two = Template("Q: {question}\\nA: "), Template("{text}|{question}|")
    assert one.render(one.row("a"), tokenizer) == "Q: a\nA: "
    assert two.render(two.row("a", "b"), tokenizer) == "a|b|"
    for template, given_, message in [(one, ("a", "b"), "no column for it"), (two, ("a",), "question would be empty")]:
        with pytest.raises(ConfigError, match=message):
            template.row(*given_)
    with pytest.raises(ConfigError, match="b would be empty"):
        Template("{a}{input}{b}").row("a", "b")


def questions_of(file):
    return [question(where, row, Template()) for where, row in load_prompts(str(file))]


def test_files_of_questions(tmp_path):
    (tmp_path / "q.txt").write_text("你好\n再见\n\n", encoding="utf-8")
    assert questions_of(tmp_path / "q.txt") == [Template().row("你好"), Template().row("再见")]
    lines = [{"prompt": "a"}, {"prompt": "a", "input": "b"}, {"instruction": "a", "input": "b"}, {"instruction": "a"}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    expected = [("a", ""), ("a", "b"), ("a", "b"), ("a", "")]
    assert questions_of(tmp_path / "q.jsonl") == [Template().row(*pair) for pair in expected]


@pytest.mark.parametrize("n, rows_per_step", [(1, 4), (8, 4), (70, 32), (5, 1)])
def test_windows_are_trainers(n, rows_per_step):
    expected = []
    for epoch in range(3):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(42 + epoch)).tolist()
        expected += [order[i : i + rows_per_step] for i in range(0, n, rows_per_step)]
    assert list(islice(windows(n, rows_per_step, 42), len(expected))) == expected
    assert len(expected) == 3 * steps_per_epoch(n, rows_per_step)
    for first in range(len(expected)):
        assert next(windows(n, rows_per_step, 42, first)) == expected[first]


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_padding_is_trainers(padding_side):
    from helpers.bases import make_tokenizer

    rows = random_examples(5, 9)
    features = [{"input_ids": r.input_ids, "attention_mask": [1] * len(r.input_ids), "labels": r.labels} for r in rows]
    theirs = DataCollatorForSeq2Seq(make_tokenizer(padding_side), padding=True)(features)
    ours = collated(rows, 3, padding_side)
    assert all(torch.equal(getattr(ours, name), theirs[name]) for name in ours._fields)
    assert {t.dtype for t in ours} == {torch.int64}
