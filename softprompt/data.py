"""Rows → token ids with labels. Knows the tokenizer and the template; nothing of padding, devices or the prompt."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tqdm import tqdm

from softprompt.errors import DataError
from softprompt.template import Template

IGNORE = -100
CHUNK = 512


class Example(NamedTuple):
    """One row as the model sees it, T token ids and T labels; labels are -100 where no loss is taken, always at a row's
    first token: in a padded batch what stands before it may be padding."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Tokenized:
    """Examples that have a target, and what was found on the way to them; `cache` is the file they were read from."""

    examples: list[Example]
    rows: int
    cut: int
    without_target: int
    empty_answers: int
    cache: str | None = None

    def __str__(self) -> str:
        tokens = sum(len(e.input_ids) for e in self.examples)
        targets = sum(map(count_targets, self.examples))
        parts = [f"{len(self.examples):,} rows, {tokens:,} tokens, {targets:,} of them targets"]
        if self.cut:
            parts.append(f"{self.cut:,} rows cut at max_length")
        if self.without_target:
            parts.append(
                f"{self.without_target:,} rows left out, their whole answer was cut "
                "(--truncation_side input or a larger --max_length keeps it)"
            )
        if self.empty_answers:
            parts.append(f"{self.empty_answers:,} rows with an empty answer (they teach to stop at once)")
        if self.cache:
            parts.append(f"token ids from the cache {self.cache}")
        return "; ".join(parts)


def count_targets(example: Example) -> int:
    """Positions that a loss is taken at: every label but -100."""
    return sum(label != IGNORE for label in example.labels)


def tokenize(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    template: Template,
    max_length: int,
    truncation_side: str = "output",
    progress: bool = False,
) -> Tokenized:
    """Prompt and answer are tokenised apart and joined, labels are -100 over the prompt, and both are cut at
    `max_length` (int, tokens), as in the article. `truncation_side="input"` shortens the prompt's longest text instead,
    as far as needed for the answer to fit, then the next one; an answer that is too long by itself is cut all the same.

    Raises:
        DataError: no row keeps a target, or the chat template refuses one.
    """
    examples, cut, empty, shortest_prompt = [], 0, 0, math.inf
    # A chat template writes its own special tokens; elsewhere the tokenizer adds to the prompt what it always adds.
    special = template.spec != "chat"
    bar = tqdm(total=len(rows), desc="tokenising", unit=" rows", disable=not progress, leave=False)
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        prompt_texts, answer_texts = zip(
            *(_rendered(number, row, tokenizer, template) for number, row in enumerate(chunk, start=start + 1)),
            strict=True,
        )
        prompts = _ids(tokenizer, list(prompt_texts), special)
        answers = _ids(tokenizer, list(answer_texts), False)
        for row, prompt, answer, text in zip(chunk, prompts, answers, answer_texts, strict=True):
            shortest_prompt = min(shortest_prompt, len(prompt))
            empty += text == tokenizer.eos_token
            if len(prompt) + len(answer) > max_length:
                cut += 1
                if truncation_side == "input":
                    prompt = _shortened(row, tokenizer, template, special, max_length - len(answer))
            examples.append(_example(prompt, answer, max_length))
        bar.update(len(chunk))
    bar.close()
    kept = [e for e in examples if count_targets(e)]
    if not kept:
        raise DataError(
            f"no row keeps a target at --max_length {max_length}: the shortest prompt alone has {shortest_prompt} "
            f"tokens; give --max_length {shortest_prompt + 16} or more, or --truncation_side input"
        )
    return Tokenized(kept, len(rows), cut, len(examples) - len(kept), empty)


def _example(prompt: list[int], answer: list[int], max_length: int) -> Example:
    labels = [IGNORE] * len(prompt) + answer
    return Example((prompt + answer)[:max_length], [IGNORE, *labels[1:max_length]])


def _shortened(row: Mapping[str, Any], tokenizer: Any, template: Template, special: bool, room: int) -> list[int]:
    """The prompt with its longest text cut to the largest number of characters that leaves it within `room` tokens;
    where none does, the same with the next text."""
    text, replaced = _longest_text(row)

    def prompt(characters: int) -> list[int]:
        return _ids(tokenizer, template.render(replaced(text[:characters]), tokenizer), special)

    fits, too_many = 0, len(text)
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if len(prompt(middle)) <= room else (fits, middle)
    shortest = prompt(fits)
    if len(shortest) <= room or not text:
        return shortest
    return _shortened(replaced(""), tokenizer, template, special, room)


def _rendered(number: int, row: Mapping[str, Any], tokenizer: Any, template: Template) -> tuple[str, str]:
    try:
        return template.render(row, tokenizer), template.answer(row, tokenizer)
    except DataError as error:
        raise DataError(f"row {number}: {error}") from None


def _ids(tokenizer: Any, texts: Any, special: bool) -> Any:
    """Token ids of a text or of several; not `verbose`, lest the tokenizer warn of rows that are about to be cut."""
    return tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]


def _longest_text(row: Mapping[str, Any]) -> tuple[str, Callable[[str], dict[str, Any]]]:
    """The longest text of a row's prompt, and a function that gives the row with another one in its place."""
    name = next((n for n in ("messages", "prompt") if isinstance(row.get(n), list)), None)
    if name is None:
        column = max((n for n in row if n not in ("output", "completion")), key=lambda n: len(row[n]))
        return row[column], lambda text: {**row, column: text}
    messages = row[name]
    asked = messages[:-1] if name == "messages" else messages
    at = max(range(len(asked)), key=lambda i: len(asked[i]["content"]))

    def replaced(text: str) -> dict[str, Any]:
        return {**row, name: [*messages[:at], {**messages[at], "content": text}, *messages[at + 1 :]]}

    return messages[at]["content"], replaced
