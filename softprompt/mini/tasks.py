"""The tasks of the mini base: different questions about the same sentences, so only the prompt decides the answer."""

import difflib
import random
from collections.abc import Callable
from typing import NamedTuple

from softprompt.mini.clauses import OTHER
from softprompt.mini.grammar import Sentence, sentences
from softprompt.mini.words import DOMAINS
from softprompt.utils.errors import DataError

SPLITS = {"train": 6400, "eval": 200}  # default number of rows; 6,400 are 200 steps of 32


class Task(NamedTuple):
    """A task: what it asks, and the function that answers it for a sentence."""

    description: str
    answer: Callable[[Sentence], str]


def _english(sentence: Sentence) -> str:
    thing = "thing" if sentence.domain == OTHER else DOMAINS[sentence.domain].english
    return f"{'good' if sentence.good else 'bad'} {thing}"


def _reply(sentence: Sentence) -> str:
    if sentence.good:
        return f"谢谢您喜欢{sentence.subject}！"
    return f"抱歉，{sentence.subject}让您失望了。"


TASKS: dict[str, Task] = {
    "sentiment": Task("is the review positive or negative (正面, 负面)", lambda s: "正面" if s.good else "负面"),
    "domain": Task("what kind of thing is reviewed (电影, 餐饮, 酒店, … 其他)", lambda s: s.domain),
    "subject": Task("the noun that is judged (剧情), or 未提到", lambda s: s.subject or "未提到"),
    "opinion": Task("the words that judge it, with their negation (好看, 不好看)", lambda s: s.opinion),
    "strength": Task("how strongly it is said (强, 中, 弱)", lambda s: s.strength),
    "negation": Task(
        "is there a negating word, 不 or 没 (有, 无)", lambda s: "有" if "不" in s.text or "没" in s.text else "无"
    ),
    "english": Task("kind and sentiment in English (good film, bad hotel)", _english),
    "reply": Task("a shop's reply that names the subject (谢谢您喜欢剧情！)", _reply),
}


def rows(task: str, split: str = "train", n: int | None = None, seed: int = 0) -> list[dict[str, str]]:
    """Generate rows whose instruction is only the sentence, without any hint at the task.

    All tasks have the same sentences. Those of `split="eval"` are held out (see `grammar.held_out`).

    Args:
        n: The number of rows, by default that of SPLITS.

    Raises:
        DataError: An unknown task or split.
    """
    if task not in TASKS:
        near = difflib.get_close_matches(task, TASKS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise DataError(f"unknown mini task {task!r}{hint}; the tasks are {', '.join(TASKS)}")
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r} of mini task {task}; the splits are {', '.join(SPLITS)}")
    made = sentences(random.Random(f"{split} {seed}"), SPLITS[split] if n is None else n, held=split == "eval")
    return [{"instruction": s.text, "input": "", "output": TASKS[task].answer(s)} for s in made]
