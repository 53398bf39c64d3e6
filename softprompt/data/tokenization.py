"""Turn rows into token ids with labels, using a tokenizer and a template. Padding, devices and soft prompts are the
business of later stages."""

import sys
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tqdm import tqdm

from softprompt.data.examples import IGNORE, Example, Examples, count_targets
from softprompt.data.parallel import map_in_processes
from softprompt.data.template import CHAT, Template, answer_message
from softprompt.utils.errors import DataError

__all__ = ["IGNORE", "Encoded", "Example", "Examples", "Tokenized", "count_targets", "encode", "end_tokens", "tokenize"]

CHUNK = 512  # how many rows are tokenized together


@dataclass(frozen=True)
class Tokenized:
    """Tokenized rows: the examples that have a target, and counts.

    Attributes:
        kept: The row number of each example, counted from 0.
        missing: For each example, how many tokens of its answer were truncated; 0 if the answer is whole.
        rows: Number of all rows.
        cut: Number of rows that were truncated.
        without_target: Number of rows that were left out because they have no target.
        empty_answers: Number of rows with an empty answer.
        cache: The cache file that the examples were read from, if any.
    """

    examples: Examples
    kept: Sequence[int]
    missing: Sequence[int]
    rows: int
    cut: int
    without_target: int
    empty_answers: int
    cache: str | None = None

    def __str__(self) -> str:
        return self.described(f"{len(self.examples):,} rows")

    def described(self, rows: str) -> str:
        """Describe the counts in one line; `rows` is the text for the number of rows."""
        tokens, targets = len(self.examples.input_ids), self.examples.targets
        parts = [f"{rows}, {tokens:,} tokens, {targets:,} of them targets"]
        parts += describe_losses(self.cut, self.without_target, self.empty_answers)
        if self.cache:
            parts.append(f"token ids from the cache {self.cache}")
        return "; ".join(parts)


def describe_losses(cut: int, without_target: int, empty_answers: int) -> list[str]:
    """Describe the rows that were truncated, left out, or have an empty answer; each argument is a number of rows."""
    parts = []
    if cut:
        parts.append(f"{cut:,} rows cut at max_length")
    if without_target:
        parts.append(
            f"{without_target:,} rows left out, their whole answer was cut "
            "(--truncation_side input or a larger --max_length keeps it)"
        )
    if empty_answers:
        parts.append(f"{empty_answers:,} rows with an empty answer (they teach the model to stop at once)")
    return parts


def end_tokens(examples: Sequence[Example], tokenizer: Any, end: str | None = None) -> list[int]:
    """Return the ids of the tokens that end an answer; the last one is that of eos_token.

    The others are the token that the chat template writes after an answer (`end`, see `Template.end`), and special
    tokens that some example ends with.
    """
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(token for token in added if added[token].special)}
    last = examples.last_ids if isinstance(examples, Examples) else {e.labels[-1] for e in examples}
    others = last & special - {tokenizer.eos_token_id, tokenizer.unk_token_id}
    if end not in (None, tokenizer.eos_token):
        others.add(tokenizer.convert_tokens_to_ids(end))
    return [*sorted(others), tokenizer.eos_token_id]


def tokenize(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    template: Template,
    max_length: int,
    truncation_side: str = "output",
    progress: bool = False,
    workers: int | None = None,
) -> Tokenized:
    """Tokenize prompt and answer separately, join them, set the prompt's labels to -100, and truncate the result to
    `max_length` tokens.

    This is what the article does, and truncates the end of the answer. `truncation_side="input"` instead shortens the
    prompt's longest text until the answer fits, then the next longest text; an answer that is too long by itself is
    still truncated.

    Args:
        progress: Show a progress bar on stderr.
        workers: The number of worker processes; None or 1 tokenizes in this process. The result does not depend on it.

    Raises:
        DataError: No row keeps a target, the chat template refuses a row, or a worker process was killed.
    """
    settings = (tokenizer, template, max_length, truncation_side)
    starts = range(0, len(rows), CHUNK)
    chunks = ((start, rows[start : start + CHUNK]) for start in starts)
    if workers and workers > 1 and len(starts) > 1:
        columns = map_in_processes(_tokenize_chunk, settings, chunks, min(workers, len(starts)))
    else:
        columns = (_tokenize_chunk(settings, chunk) for chunk in chunks)
    whole = _Columns()
    with tqdm(total=len(rows), desc="tokenizing", unit=" rows", disable=not progress, leave=False) as bar:
        for part in columns:
            whole.extend(part)
            bar.update(part.rows)
    if not whole.kept:
        raise no_targets_error(whole.shortest_prompt, max_length)
    return whole.tokenized()


def _tokenize_chunk(settings: tuple[Any, Template, int, str], chunk: tuple[int, Sequence[Any]]) -> "_Columns":
    """Tokenize consecutive rows; `chunk` holds the number of the first one, and the rows."""
    start, rows = chunk[0], list(chunk[1])
    places = [f"row {number}" for number in range(start + 1, start + len(rows) + 1)]
    columns = _Columns()
    for number, row in enumerate(encode(rows, places, *settings), start=start):
        columns.append(number, row)
    return columns


def _ints() -> "array[int]":
    return array("i")


@dataclass
class _Columns:
    """Examples in arrays that can be appended to, and the counts of `Tokenized`: a compact form to send from one
    process to another."""

    input_ids: "array[int]" = field(default_factory=_ints)
    lengths: "array[int]" = field(default_factory=_ints)
    first_targets: "array[int]" = field(default_factory=_ints)
    kept: "array[int]" = field(default_factory=_ints)
    missing: "array[int]" = field(default_factory=_ints)
    rows: int = 0
    cut: int = 0
    empty_answers: int = 0
    shortest_prompt: int = sys.maxsize

    def append(self, number: int, row: "Encoded") -> None:
        self.rows += 1
        self.cut += row.cut
        self.empty_answers += row.empty
        self.shortest_prompt = min(self.shortest_prompt, row.prompt_length)
        first_target = row.example.labels.count(IGNORE)
        if first_target < len(row.example.labels):
            self.input_ids.extend(row.example.input_ids)
            self.lengths.append(len(row.example.input_ids))
            self.first_targets.append(first_target)
            self.kept.append(number)
            self.missing.append(row.missing)

    def extend(self, other: "_Columns") -> None:
        for name in ("input_ids", "lengths", "first_targets", "kept", "missing"):
            getattr(self, name).extend(getattr(other, name))
        self.rows += other.rows
        self.cut += other.cut
        self.empty_answers += other.empty_answers
        self.shortest_prompt = min(self.shortest_prompt, other.shortest_prompt)

    def tokenized(self) -> Tokenized:
        examples = Examples.from_columns(self.input_ids, self.lengths, self.first_targets)
        left_out = self.rows - len(examples)
        return Tokenized(examples, self.kept, self.missing, self.rows, self.cut, left_out, self.empty_answers)


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
    """Return the token ids of prompt texts. For other templates than "chat", which writes its own special tokens, the
    tokenizer adds those that begin a text (see `text_ids`)."""
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


def no_targets_error(shortest_prompt: int, max_length: int) -> DataError:
    return DataError(
        f"no row keeps a target at --max_length {max_length}: the shortest prompt alone has {shortest_prompt} "
        f"tokens; give --max_length {shortest_prompt + 16} or more, or --truncation_side input"
    )


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
