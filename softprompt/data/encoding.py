"""Rows as token ids with labels (rendered, tokenized, joined and truncated), and the passages of a plain text."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from softprompt.data.chat_template import answer_message
from softprompt.data.examples import IGNORE, Example, Examples
from softprompt.data.readers import read_text
from softprompt.data.template import CHAT, Template
from softprompt.utils.errors import ConfigError, DataError


class Encoded(NamedTuple):
    """One row as an example, which may have no target.

    `cut` says whether the row was truncated, and `empty` whether the answer is empty. `prompt_length` is the number of
    tokens of the prompt before truncation, and `missing` is the number of tokens by which the answer was truncated.
    """

    example: Example
    cut: bool
    empty: bool
    prompt_length: int
    missing: int = 0


def encode(
    rows: Sequence[Mapping[str, Any]],
    places: Sequence[str],
    tokenizer: Any,
    template: Template,
    max_length: int,
    truncation_side: str,
) -> list[Encoded]:
    """Tokenize rows as `tokenize` describes; `places` name the rows in error messages.

    Raises:
        DataError: The chat template refuses a row.
    """
    texts = [_rendered(place, row, tokenizer, template) for place, row in zip(places, rows, strict=True)]
    prompts = prompt_ids(tokenizer, [prompt for prompt, _ in texts], template)
    answers = _ids(tokenizer, [answer for _, answer in texts])
    encoded = []
    for row, prompt, answer in zip(rows, prompts, answers, strict=True):
        prompt_length, cut = len(prompt), len(prompt) + len(answer) > max_length
        if cut and truncation_side == "input":
            prompt = _shortened(row, tokenizer, template, max_length - len(answer))
        empty = is_empty(row, template)
        missing = min(len(answer), max(0, len(prompt) + len(answer) - max_length))
        encoded.append(Encoded(_example(prompt, answer, max_length), cut, empty, prompt_length, missing))
    return encoded


def prompt_ids(tokenizer: Any, texts: Sequence[str], template: Template) -> list[list[int]]:
    """Return the token ids of prompt texts. They include the special tokens that the tokenizer adds before a text (see
    `text_ids`), except for the template "chat", which writes its own special tokens."""
    return _ids(tokenizer, texts) if template.spec == CHAT else text_ids(tokenizer, texts)


def text_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of texts that will be continued. They include the special tokens that the tokenizer adds
    before a text (a begin token), but not those that it adds after a text (an end token, BERT's [SEP])."""
    front = begin_ids(tokenizer)
    return [[*front, *ids] for ids in _ids(tokenizer, texts)]


def begin_ids(tokenizer: Any) -> list[int]:
    """Return the ids of the special tokens that the tokenizer adds before every text; BLOOM's adds none."""
    (bare,) = _ids(tokenizer, ["a"])
    whole = tokenizer("a", verbose=False)["input_ids"]
    start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return list(whole[:start])


def is_empty(row: Mapping[str, Any], template: Template) -> bool:
    """Whether the answer of a row has no text and calls no tool."""
    answer = answer_message(row) if template.spec == CHAT else {"content": row["output"]}
    return not answer["content"] and "tool_calls" not in answer


def _example(prompt: list[int], answer: list[int], max_length: int) -> Example:
    labels = [IGNORE] * len(prompt) + answer
    return Example((prompt + answer)[:max_length], [IGNORE, *labels[1:max_length]])


def _shortened(row: Mapping[str, Any], tokenizer: Any, template: Template, room: int) -> list[int]:
    """Return the token ids of the prompt with its longest text truncated to as many characters as fit into `room`
    tokens. If the prompt is too long even with that text empty, also truncate the next longest text."""
    text, replaced = _longest_text(row)

    def prompt(characters: int) -> list[int]:
        return prompt_ids(tokenizer, [template.render(replaced(text[:characters]), tokenizer)], template)[0]

    fits, too_many = 0, len(text)
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if len(prompt(middle)) <= room else (fits, middle)
    shortest = prompt(fits)
    if len(shortest) <= room or not text:
        return shortest
    return _shortened(replaced(""), tokenizer, template, room)


def _rendered(place: str, row: Mapping[str, Any], tokenizer: Any, template: Template) -> tuple[str, str]:
    try:
        return template.render(row, tokenizer), template.answer(row, tokenizer)
    except DataError as error:
        raise DataError(f"{place}: {error}") from None


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return token ids without special tokens. `verbose=False` suppresses the warning about long rows, which are
    truncated later."""
    without = {"return_attention_mask": False, "return_token_type_ids": False}
    return tokenizer(list(texts), add_special_tokens=False, verbose=False, **without)["input_ids"]


def _longest_text(row: Mapping[str, Any]) -> tuple[str, Callable[[str], dict[str, Any]]]:
    """Return the longest text of a row's prompt, and a function that returns the row with that text replaced."""
    name = next((n for n in ("messages", "prompt") if isinstance(row.get(n), list)), None)
    if name is None:
        answer = "output" if "output" in row else "completion"
        column = max((n for n in row if n != answer and isinstance(row[n], str)), key=lambda n: len(row[n]))
        return row[column], lambda text: {**row, column: text}
    messages = row[name]
    asked = messages[:-1] if name == "messages" else messages
    at = max(range(len(asked)), key=lambda i: len(asked[i]["content"]))

    def replaced(text: str) -> dict[str, Any]:
        return {**row, name: [*messages[:at], {**messages[at], "content": text}, *messages[at + 1 :]]}

    return messages[at]["content"], replaced


def passages(source: str, tokenizer: Any, max_length: int) -> Examples:
    """Cut the text of a file into passages of `max_length` tokens.

    Each passage begins with the last token of the previous passage; that first token is not a target. These are the
    rolling windows of EleutherAI's lm-evaluation-harness with one token of context: each token is predicted from at
    most max_length - 1 tokens before it, and from the soft prompt if there is one.

    Raises:
        DataError: The file does not exist, is not UTF-8, or has fewer than two tokens.
        ConfigError: `max_length` leaves passages without a target.
    """
    if max_length < 2:
        raise ConfigError(f"--max_length {max_length} leaves a passage of {source} nothing to predict; give 2 or more")
    if not Path(source).is_file():
        raise DataError(f"--eval_dataset {source}: no such file; name an existing file")
    (ids,) = text_ids(tokenizer, [read_text(Path(source))])
    if len(ids) < 2:
        raise DataError(f"--eval_dataset {source}: its text has {len(ids)} tokens; expected at least 2")
    cut = (ids[start : start + max_length] for start in range(0, len(ids) - 1, max_length - 1))
    return Examples.from_rows(Example(some, [IGNORE, *some[1:]]) for some in cut)
