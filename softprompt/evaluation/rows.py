"""The parts of tokenized rows that an evaluation compares: questions, expected answers, and their texts."""

from collections.abc import Sequence
from typing import Any

from softprompt.data.tokenization import IGNORE, Example, count_targets

SHORT_ANSWER = 32  # the largest number of tokens of an answer that is compared, its end token included


def question_ids(example: Example) -> list[int]:
    """Return the token ids of a row before its first target."""
    first = next(i for i, label in enumerate(example.labels) if label != IGNORE)
    return example.input_ids[:first]


def answer_ids(example: Example) -> list[int]:
    """Return the token ids of a row's targets."""
    return [label for label in example.labels if label != IGNORE]


def answer_lengths(examples: Sequence[Example], missing: Sequence[int] = ()) -> list[int]:
    """Return the number of tokens of each row's whole answer, truncated tokens included."""
    rows = zip(examples, missing or [0] * len(examples), strict=True)
    return [count_targets(example) + truncated for example, truncated in rows]


def answers_are_short(examples: Sequence[Example], missing: Sequence[int] = ()) -> bool:
    """Whether the whole answers of all rows have at most SHORT_ANSWER tokens."""
    return max(answer_lengths(examples, missing)) <= SHORT_ANSWER


def decode_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """Decode token ids without special tokens and without white space at the ends."""
    return tokenizer.decode(ids, skip_special_tokens=True).strip()
