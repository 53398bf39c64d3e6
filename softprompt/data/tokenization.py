"""Rows → token ids with labels. Knows the tokenizer and the template; nothing of padding, devices or the prompt."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tqdm import tqdm

from softprompt.data.template import CHAT, Template, answer_message
from softprompt.utils.errors import DataError

IGNORE = -100
CHUNK = 512


class Example(NamedTuple):
    """One row as the model sees it, T token ids and T labels; labels are -100 where no loss is taken, always at a row's
    first token: the bare base has nothing to predict it from."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Tokenized:
    """Examples that have a target, and what was found on the way to them. Of each example, `kept` holds its row's
    number (from 0) and `missing` the tokens of its answer that were cut off, 0 where the answer is whole; `cache` is
    the file they were read from."""

    examples: list[Example]
    kept: list[int]
    missing: list[int]
    rows: int
    cut: int
    without_target: int
    empty_answers: int
    cache: str | None = None

    def __str__(self) -> str:
        return self.described(f"{len(self.examples):,} rows")

    def described(self, rows: str) -> str:
        """`rows` say how many these are."""
        tokens = sum(len(e.input_ids) for e in self.examples)
        targets = sum(map(count_targets, self.examples))
        parts = [f"{rows}, {tokens:,} tokens, {targets:,} of them targets"]
        parts += found_on_the_way(self.cut, self.without_target, self.empty_answers)
        if self.cache:
            parts.append(f"token ids from the cache {self.cache}")
        return "; ".join(parts)


def found_on_the_way(cut: int, without_target: int, empty_answers: int) -> list[str]:
    """What a user should know of rows that became examples, or did not."""
    parts = []
    if cut:
        parts.append(f"{cut:,} rows cut at max_length")
    if without_target:
        parts.append(
            f"{without_target:,} rows left out, their whole answer was cut "
            "(--truncation_side input or a larger --max_length keeps it)"
        )
    if empty_answers:
        parts.append(f"{empty_answers:,} rows with an empty answer (they teach to stop at once)")
    return parts


def count_targets(example: Example) -> int:
    """Positions that a loss is taken at: every label but -100."""
    return len(example.labels) - example.labels.count(IGNORE)


def end_tokens(examples: Sequence[Example], tokenizer: Any, end: str | None = None) -> list[int]:
    """Ids of the tokens that end an answer: the tokenizer's eos_token, the one that the chat template writes there
    (`end`, as of `Template.end`), and other special tokens at the end of an example's targets."""
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(token for token in added if added[token].special)}
    others = {e.labels[-1] for e in examples} & special - {tokenizer.eos_token_id, tokenizer.unk_token_id}
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
) -> Tokenized:
    """Prompt and answer are tokenised apart and joined, labels are -100 over the prompt, and both are cut at
    `max_length` (int, tokens), as in the article. `truncation_side="input"` shortens the prompt's longest text instead,
    as far as needed for the answer to fit, then the next one; an answer that is too long by itself is cut all the same.

    Raises:
        DataError: no row keeps a target, or the chat template refuses one.
    """
    encoded: list[Encoded] = []
    bar = tqdm(total=len(rows), desc="tokenising", unit=" rows", disable=not progress, leave=False)
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        places = [f"row {number}" for number in range(start + 1, start + len(chunk) + 1)]
        encoded += encode(chunk, places, tokenizer, template, max_length, truncation_side)
        bar.update(len(chunk))
    bar.close()
    kept = [number for number, e in enumerate(encoded) if count_targets(e.example)]
    if not kept:
        raise no_targets(min(e.asked for e in encoded), max_length)
    examples, missing = [encoded[n].example for n in kept], [encoded[n].missing for n in kept]
    cut, empty = sum(e.cut for e in encoded), sum(e.empty for e in encoded)
    return Tokenized(examples, kept, missing, len(rows), cut, len(encoded) - len(kept), empty)


class Encoded(NamedTuple):
    """A row's example, with or without a target; whether it was cut, whether its answer is empty, the tokens of its
    prompt before any cut, and those of its answer that were cut off."""

    example: Example
    cut: bool
    empty: bool
    asked: int
    missing: int = 0


def encode(
    rows: Sequence[Mapping[str, Any]],
    places: Sequence[str],
    tokenizer: Any,
    template: Template,
    max_length: int,
    truncation_side: str,
) -> list[Encoded]:
    """See `tokenize`; `places` name the rows.

    Raises:
        DataError: the chat template refuses a row.
    """
    texts = [_rendered(place, row, tokenizer, template) for place, row in zip(places, rows, strict=True)]
    prompts = prompt_ids(tokenizer, [prompt for prompt, _ in texts], template)
    answers = _ids(tokenizer, [answer for _, answer in texts])
    encoded = []
    for row, prompt, answer in zip(rows, prompts, answers, strict=True):
        asked, cut = len(prompt), len(prompt) + len(answer) > max_length
        if cut and truncation_side == "input":
            prompt = _shortened(row, tokenizer, template, max_length - len(answer))
        empty = is_empty(row, template)
        missing = min(len(answer), max(0, len(prompt) + len(answer) - max_length))
        encoded.append(Encoded(_example(prompt, answer, max_length), cut, empty, asked, missing))
    return encoded


def prompt_ids(tokenizer: Any, texts: Sequence[str], template: Template) -> list[list[int]]:
    """Token ids of prompt texts. A chat template writes its own special tokens; elsewhere the tokenizer's are kept as
    of `text_ids`."""
    return _ids(tokenizer, texts) if template.spec == CHAT else text_ids(tokenizer, texts)


def text_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts that something follows: what the tokenizer always puts in front of a text (a begin token) is
    kept, what it puts behind one (an end token, BERT's [SEP]) is not."""
    front = begin_ids(tokenizer)
    return [[*front, *ids] for ids in _ids(tokenizer, texts)]


def begin_ids(tokenizer: Any) -> list[int]:
    """Token ids that the tokenizer puts in front of every text by itself; none for BLOOM's."""
    (bare,) = _ids(tokenizer, ["a"])
    whole = tokenizer("a", verbose=False)["input_ids"]
    start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return list(whole[:start])


def is_empty(row: Mapping[str, Any], template: Template) -> bool:
    """Whether the answer of a row says nothing and calls nothing."""
    answer = answer_message(row) if template.spec == CHAT else {"content": row["output"]}
    return not answer["content"] and "tool_calls" not in answer


def no_targets(shortest_prompt: int, max_length: int) -> DataError:
    return DataError(
        f"no row keeps a target at --max_length {max_length}: the shortest prompt alone has {shortest_prompt} "
        f"tokens; give --max_length {shortest_prompt + 16} or more, or --truncation_side input"
    )


def _example(prompt: list[int], answer: list[int], max_length: int) -> Example:
    labels = [IGNORE] * len(prompt) + answer
    return Example((prompt + answer)[:max_length], [IGNORE, *labels[1:max_length]])


def _shortened(row: Mapping[str, Any], tokenizer: Any, template: Template, room: int) -> list[int]:
    """The prompt with its longest text cut to the largest number of characters that leaves it within `room` tokens;
    where none does, the same with the next text."""
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
    """Token ids of the texts alone; not `verbose`, lest the tokenizer warn of rows that are about to be cut."""
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def _longest_text(row: Mapping[str, Any]) -> tuple[str, Callable[[str], dict[str, Any]]]:
    """The longest text of a row's prompt, and a function that gives the row with another one in its place."""
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
