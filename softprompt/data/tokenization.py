"""Turn rows into token ids with labels, using a tokenizer and a template. Padding, devices and soft prompts are the
business of later stages."""

import sys
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from softprompt.data.encoding import encode
from softprompt.data.examples import IGNORE, Example, Examples, count_targets
from softprompt.data.parallel import map_in_processes
from softprompt.data.template import Template
from softprompt.utils.errors import DataError
from softprompt.utils.progress import progress_bar

__all__ = ["IGNORE", "Example", "Examples", "Tokenized", "count_targets", "end_tokens", "tokenize"]

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
        """Describe the counts in one line."""
        tokens, targets = len(self.examples.input_ids), self.examples.targets
        parts = [f"{self.used_rows}, {tokens:,} tokens, {targets:,} of them targets"]
        parts += describe_losses(self.cut, self.without_target, self.empty_answers)
        if self.cache:
            parts.append(f"token ids from the cache {self.cache}")
        return "; ".join(parts)

    @property
    def used_rows(self) -> str:
        """The number of rows as text: "73 of 100 rows" if some were left out."""
        n = len(self.examples)
        return f"{n:,} of {self.rows:,} rows" if n < self.rows else f"{n:,} rows"


def describe_losses(cut: int, without_target: int, empty_answers: int) -> list[str]:
    """Describe the rows that were truncated, left out, or have an empty answer; each argument is a number of rows."""
    parts = []
    if cut:
        parts.append(f"{cut:,} rows cut at max_length")
    if without_target:
        parts.append(
            f"{without_target:,} rows left out because their whole answer was cut "
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
    workers: int | None = None,
) -> Tokenized:
    """Tokenize prompt and answer separately, join them, set the prompt's labels to -100, and truncate the result to
    `max_length` tokens.

    The article that README.md names does the same: a row that is too long loses the end of its answer.
    `truncation_side="input"` instead shortens the prompt's longest text until the answer fits, then the next longest
    text; an answer that is too long by itself is still truncated.

    Args:
        workers: The number of worker processes; None or 1 tokenizes in this process. The result does not depend on it.

    Raises:
        DataError: No row keeps a target, the chat template refuses a row, or a worker process was killed.
    """
    parts = _tokenized_chunks(rows, (tokenizer, template, max_length, truncation_side), workers or 1)
    whole, counts, shortest_prompt = _empty_columns(), Counter[str](), sys.maxsize
    with progress_bar(len(rows), "tokenizing", " rows") as bar:
        for columns, of_part, shortest in parts:
            for name, values in columns.items():
                whole[name].extend(values)
            counts.update(of_part)
            shortest_prompt = min(shortest_prompt, shortest)
            bar.update(of_part["rows"])
    if not whole["kept"]:
        raise no_targets_error(shortest_prompt, max_length)
    examples = Examples.from_columns(whole["input_ids"], whole["lengths"], whole["first_targets"])
    left_out, empty = len(rows) - len(examples), counts["empty_answers"]
    return Tokenized(examples, whole["kept"], whole["missing"], len(rows), counts["cut"], left_out, empty)


def _tokenized_chunks(
    rows: Sequence[Any], settings: tuple[Any, Template, int, str], workers: int
) -> "Iterator[tuple[dict[str, array[int]], Counter[str], int]]":
    starts = range(0, len(rows), CHUNK)
    chunks = ((start, rows[start : start + CHUNK]) for start in starts)
    if workers > 1 and len(starts) > 1:
        return map_in_processes(_tokenize_chunk, settings, chunks, min(workers, len(starts)))
    return (_tokenize_chunk(settings, chunk) for chunk in chunks)


def _empty_columns() -> "dict[str, array[int]]":
    """Return arrays for the columns of `Examples` and `Tokenized`: a compact form to send from one process to
    another."""
    return {name: array("i") for name in ("input_ids", "lengths", "first_targets", "kept", "missing")}


def _tokenize_chunk(
    settings: tuple[Any, Template, int, str], chunk: tuple[int, Sequence[Any]]
) -> "tuple[dict[str, array[int]], Counter[str], int]":
    """Tokenize consecutive rows; `chunk` holds the number of the first one, and the rows. Return their columns, the
    counts of `Tokenized`, and the length of the shortest prompt."""
    start, rows = chunk[0], list(chunk[1])
    places = [f"row {number}" for number in range(start + 1, start + len(rows) + 1)]
    encoded = encode(rows, places, *settings)
    columns = _empty_columns()
    for number, row in enumerate(encoded, start=start):
        ids, first_target = row.example.input_ids, row.example.labels.count(IGNORE)
        if first_target < len(ids):
            columns["input_ids"].extend(ids)
            columns["lengths"].append(len(ids))
            columns["first_targets"].append(first_target)
            columns["kept"].append(number)
            columns["missing"].append(row.missing)
    counts = Counter(rows=len(rows), cut=sum(e.cut for e in encoded), empty_answers=sum(e.empty for e in encoded))
    return columns, counts, min(e.prompt_length for e in encoded)


def no_targets_error(shortest_prompt: int, max_length: int) -> DataError:
    """Return the error for a dataset in which no row keeps a target; `shortest_prompt` is in tokens."""
    return DataError(
        f"no row keeps a target at --max_length {max_length}: the shortest prompt alone has {shortest_prompt} "
        f"tokens; give --max_length {shortest_prompt + 16} or more, or --truncation_side input"
    )
