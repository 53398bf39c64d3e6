"""Tell the texts that the mini base can know, short Chinese reviews in the words of its grammar, from all others."""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from softprompt.mini import BASE_DIR, corpus, words
from softprompt.mini.tasks import TASKS
from softprompt.utils.shell_commands import train_call

ROWS_JUDGED = 100  # a set of rows is judged by so many of its first rows
LONGEST = 60  # characters; the reviews of the grammar are shorter
MOST_UNKNOWN = 0.2  # the largest share of a known text's characters that the grammar does not have
CHINESE, OTHERS = "Langboat/bloom-1b4-zh", "HuggingFaceTB/SmolLM2-135M-Instruct"  # real bases to suggest


def is_mini(base: str | None) -> bool:
    """Whether the name or path of a base is that of the mini base."""
    return base in ("mini", str(BASE_DIR))


def foreign_note(texts: Iterable[str], given: Mapping[str, Any] | None = None) -> str | None:
    """Return what to know about the mini base if most of `texts` are foreign to it; None if they are not.

    Args:
        texts: Questions to the base, or those of rows to train on.
        given: Settings of the rows, to repeat in the command that trains for a real base.
    """
    texts = [text for text in texts if text.strip()]
    if 2 * sum(map(is_foreign, texts)) <= len(texts):
        return None
    base = CHINESE if any(re.search("[\u4e00-\u9fff]", text) for text in texts) else OTHERS
    tasks = ", ".join(f"mini:{task}" for task in TASKS)
    call = train_call({"model_name_or_path": base, **(given or {"dataset": "rows.jsonl"})})
    return (
        f"note: the base mini has 1.2 M parameters and knows only short Chinese reviews like those of its own tasks "
        f"({tasks}); expect little of it on other texts. To train for a real base: {call}"
    )


def is_foreign(text: str) -> bool:
    """Whether a text is longer than the reviews that the mini base has seen, or has many characters that they lack."""
    letters = [c for c in text if c.isalnum()]
    unknown = sum(c not in _characters() for c in letters)
    return len(letters) > LONGEST or unknown > MOST_UNKNOWN * len(letters)


@cache
def _characters() -> frozenset[str]:
    """Return the Chinese characters of the grammar's words, and of the requests in the base's corpus."""
    data = [value for name, value in vars(words).items() if name.isupper()]
    return frozenset(re.findall("[\u4e00-\u9fff]", repr((data, corpus.TOPICS, corpus.FRAMES))))
