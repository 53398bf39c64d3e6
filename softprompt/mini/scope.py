"""Recognize texts that are unlike the training data of the mini base: short Chinese reviews in the words of a
grammar."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from softprompt.mini import BASE_DIR, corpus, words
from softprompt.mini.tasks import TASKS, rows
from softprompt.utils.shell_commands import train_call

ROWS_JUDGED = 100  # only this many rows, the first ones, are checked
LONGEST = 60  # maximum number of units (see `_units`); the reviews of the grammar have fewer than 40
MOST_UNKNOWN = 0.2  # maximum share of a text's units that the grammar may lack
CHINESE, OTHERS = "Langboat/bloom-1b4-zh", "HuggingFaceTB/SmolLM2-135M-Instruct"  # real bases to suggest


def is_mini(base: str | None) -> bool:
    """Whether the name or path of a base is that of the mini base."""
    return base in ("mini", str(BASE_DIR))


def foreign_note(texts_of_rows: Iterable[Sequence[str]], given: Mapping[str, Any] | None = None) -> str | None:
    """Return a note about the mini base if a text of most rows is foreign to it (see `is_foreign`); else None.

    Args:
        texts_of_rows: The texts of each row: its question, and its answer if it has one.
        given: Settings of the rows, to repeat in the command that trains for a real base.
    """
    asked = list(texts_of_rows)
    if 2 * sum(any(map(is_foreign, texts)) for texts in asked) <= len(asked):
        return None
    is_chinese = any(re.search("[\u4e00-\u9fff]", text) for texts in asked for text in texts)
    base = CHINESE if is_chinese else OTHERS
    tasks = ", ".join(f"mini:{task}" for task in TASKS)
    call = train_call({"model_name_or_path": base, **(given or {"dataset": "rows.jsonl"})})
    return (
        f"note: the base mini has 1.2 M parameters and knows only short Chinese reviews such as those of its own tasks "
        f"({tasks}); do not expect good results on other data. To train for a real base: {call}"
    )


def is_foreign(text: str) -> bool:
    """Whether a text is unlike the training data: it has more than LONGEST units, or too many unknown ones."""
    found = _units(text)
    unknown = sum(unit not in _known() for unit in found)
    return len(found) > LONGEST or unknown > MOST_UNKNOWN * len(found)


def _units(text: str) -> list[str]:
    """Return the words of a text in lower case, each Chinese character on its own."""
    return re.findall(r"[\u4e00-\u9fff]|[^\W\u4e00-\u9fff]+", text.lower())


@cache
def _known() -> frozenset[str]:
    """Return the units of the grammar's words, of the requests in the base's corpus, and of answers to its tasks."""
    data = [value for name, value in vars(words).items() if name.isupper()]
    answers = [row["output"] for task in TASKS for row in rows(task, n=100)]
    return frozenset(_units(repr((data, corpus.TOPICS, corpus.FRAMES, answers))))
