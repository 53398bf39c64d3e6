"""The questions of a distillation: read them, and put the text that is distilled before them."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from softprompt.config.data_args import is_mini_task
from softprompt.config.loader import TrainConfig
from softprompt.data.build_data import Rows, describe_duplicates, note_on_mini
from softprompt.data.chat_template import prompt_messages
from softprompt.data.dataset import load_prompts, question, question_of_row
from softprompt.data.encoding import begin_ids, prompt_ids
from softprompt.data.messages import CONVERSATIONS
from softprompt.data.readers import decode_text
from softprompt.data.row_store import Row, RowStore
from softprompt.data.split_files import TRAIN
from softprompt.data.splits import find_splits
from softprompt.data.template import CHAT, Template
from softprompt.mini import rows as mini_rows
from softprompt.mini.texts import mini_text
from softprompt.utils.errors import DataError


def read_questions(config: TrainConfig, template: Template) -> Rows:
    """Read the training questions of --dataset, and the held-out ones of --eval_dataset, --eval_rows or a mini task.

    Raises:
        DataError: A dataset cannot be read or has no questions, a row lacks a text that the template needs, or
            --eval_rows leaves no question to train on.
    """
    data = config.data
    train, notices = _questions(config, template, str(data.dataset), "train", data.dataset_split, "--dataset")
    return with_held_out(config, template, train, notices)


def with_held_out(config: TrainConfig, template: Template, train: RowStore, notices: Sequence[str]) -> Rows:
    """Return questions with the held-out ones: the last ones with --eval_rows, or those of --eval_dataset. Add
    notices about duplicates, and about questions of a kind that the mini base was not trained on.

    Raises:
        DataError: See `read_questions`.
    """
    data, held_out = config.data, RowStore()
    if data.eval_rows:
        if data.eval_rows >= len(train):
            raise DataError(
                f"--eval_rows {data.eval_rows} leaves none of the {len(train):,} questions to train on; give fewer"
            )
        held_out = train.split_off(data.eval_rows)
    elif data.held_out:
        held_out, more = _questions(config, template, data.held_out, "eval", data.eval_split, "--eval_dataset")
        notices = list(dict.fromkeys([*notices, *more]))
    rows = Rows(train, held_out, notices=[*notices, *describe_duplicates(train, held_out)])
    return rows._replace(notices=[*rows.notices, *note_on_mini(config, rows)])


def _questions(
    config: TrainConfig, template: Template, source: str, part: str, split: str | None, flag: str
) -> tuple[RowStore, list[str]]:
    """Return the questions of a dataset, and a notice if it has answers, which are not used."""
    if is_mini_task(source):
        located = [(f"{source}, row {n}", row) for n, row in enumerate(_of_mini(source, part), start=1)]
    elif Path(source).suffix.lower() == ".txt":
        if split not in (None, TRAIN):
            raise DataError(f"{source} has no splits; leave --{'dataset' if part == 'train' else 'eval'}_split out")
        rows = RowStore(question(place, row, template) for place, row in load_prompts(source, flag))
        return rows, []
    else:
        splits = find_splits(source, config.data.dataset_config_name)
        selected = splits.select(split, "--dataset_split" if part == "train" else "--eval_split")
        located = [(f"{source}, {where}", row) for where, row in selected.rows]
    rows = RowStore(question_of_row(place, row, template, config.columns) for place, row in located)
    if not rows:
        raise DataError(f"{source} holds no questions; expected at least one")
    answered = any(_has_answer(row, config.columns) for _, row in located)
    return rows, [f"{source}: the answers of its rows are not used; the base answers the questions"] * answered


def _has_answer(row: Mapping[str, Any], columns: Mapping[str, str]) -> bool:
    """Whether a row of a dataset holds an answer: in a column of its own, or as the last message of a conversation."""
    last = [row[name][-1] for name in CONVERSATIONS if isinstance(row.get(name), list) and row[name]]
    said = any(isinstance(one, Mapping) and one.get("role", one.get("from")) in ANSWERING for one in last)
    return said or any(row.get(columns.get(name, name)) for name in ("output", "completion"))


ANSWERING = ("assistant", "gpt")  # roles of the messages that are answers


def _of_mini(source: str, part: str) -> Sequence[Mapping[str, Any]]:
    return mini_rows(source.removeprefix("mini:"), part, QUESTIONS_OF_MINI[part])


QUESTIONS_OF_MINI = {"train": 64, "eval": 50}  # of the thousands that a mini task can generate


class TextRows(NamedTuple):
    """Questions as token ids, without and with a text before them.

    Attributes:
        plain: Each question as it is asked with the learned prompt, without virtual tokens.
        prefix: The ids with which all questions with the text begin: the text, and what stands around it.
        with_text: Each question with the text before it, without `prefix`; at least one id.
    """

    plain: list[list[int]]
    prefix: list[int]
    with_text: list[list[int]]


def read_distilled_text(source: str) -> str:
    """Return the text that is distilled: that of a file, or of the mini base (mini:NAME).

    Raises:
        DataError: The file does not exist, cannot be read, is not UTF-8, or is empty.
    """
    if is_mini_task(source):
        return mini_text(source)
    if Path(source).is_dir():
        raise DataError(f"{source} is a folder; name a text file with --distill_prompt or --distill_context")
    if not Path(source).is_file():
        raise DataError(f"{source}: no such file; name a text file with --distill_prompt or --distill_context")
    text = decode_text(Path(source))
    if not text.strip():
        raise DataError(f"{source} is empty; write the text to distill into it")
    return text if text[-1].isspace() else f"{text}\n"


def put_text_before(rows: Iterable[Row], text: str, ids: list[int], tokenizer: Any, template: Template) -> TextRows:
    """Tokenize questions without and with a text before them.

    With the template "chat", the text is the system message, or stands at the beginning of a row's own one. With other
    templates, it stands before the rendered question, behind the special tokens that the tokenizer adds before a text.

    Args:
        ids: The text as token ids; see `text_ids`.

    Raises:
        DataError: A question has no tokens, or the chat template writes no system message.
    """
    plain, behind, remaining = list[list[int]](), BehindPrefix(), iter(rows)
    while some := list(islice(remaining, CHUNK)):  # the text is in memory with CHUNK questions at a time
        asked = prompt_ids(tokenizer, [template.render(row, tokenizer) for row in some], template)
        if not all(asked):
            raise DataError(f"question {len(plain) + asked.index([]) + 1} has no tokens; write a question")
        found = with_text_ids(some, asked, ids, text.strip(), tokenizer, template)
        if found == asked:
            raise DataError(f"the chat template writes no system message, where the text to distill would be; {_OTHER}")
        for whole in found:
            behind.append(whole)
        plain += asked
    return TextRows(plain, behind.prefix, behind.rows)


def text_ids(text: str, tokenizer: Any) -> list[int]:
    """Return the token ids of the text to distill, without special tokens. Raises DataError if it has none."""
    (ids,) = prompt_ids(tokenizer, [text], Template(CHAT))
    if not ids:
        raise DataError("the text to distill has no tokens; name a file with a longer text")
    return ids


CHUNK = 64  # questions that are tokenized together


class BehindPrefix:
    """Rows of token ids, stored without the ids with which all of them begin; at least one id of each row is kept.

    Attributes:
        prefix: The ids with which all rows begin.
        rows: The other ids of each row.
    """

    def __init__(self) -> None:
        self.prefix, self.rows = list[int](), list[list[int]]()

    def append(self, row: Sequence[int]) -> None:
        """Add a row of at least one id."""
        if not self.rows:
            self.prefix = list(row[:-1])
        most = min(len(self.prefix), len(row) - 1)
        same = next((at for at in range(most) if row[at] != self.prefix[at]), most)
        if same < len(self.prefix):
            self.rows = [[*self.prefix[same:], *other] for other in self.rows]
            self.prefix = self.prefix[:same]
        self.rows.append(list(row[same:]))


def with_text_ids(
    rows: Sequence[Row], plain: Sequence[list[int]], ids: list[int], text: str, tokenizer: Any, template: Template
) -> list[list[int]]:
    """Return the token ids of questions with a text before them; see `put_text_before`.

    Args:
        plain: The token ids of the questions without the text.
        ids, text: The text as token ids, and as the system message of a chat.
    """
    if template.spec != CHAT:
        front = begin_ids(tokenizer)
        return [[*front, *ids, *row[len(front) :]] for row in plain]
    if not text:  # the beginning of a text may be white space, which is no system message
        return list(plain)
    try:
        rendered = [template.render(_with_system(row, text), tokenizer) for row in rows]
    except DataError as error:
        raise DataError(f"the text to distill is the system message of a chat, and {error}; {_OTHER}") from None
    return prompt_ids(tokenizer, rendered, template)


_OTHER = "give --template a format string"


def _with_system(row: Row, text: str) -> Row:
    messages = prompt_messages(row)
    if messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{text}\n\n{messages[0]['content']}"}
        return {**row, "messages": [first, *messages[1:]]}
    return {**row, "messages": [{"role": "system", "content": text}, *messages]}


def with_answer(row: Row, text: str) -> Row:
    """Return a question with an answer, as a row to train on."""
    if "messages" in row:
        return {**row, "messages": [*row["messages"], {"role": "assistant", "content": text}]}
    return {**row, "completion" if "prompt" in row else "output": text}
