"""The pre-training corpus of the mini base: all tasks, requested in words in many ways.

A request stands either beside the review, after "Human: ", or on a line before "Human: ", where a soft prompt is put
later. Such lines teach the base to let a prompt select its task. A review without a request is answered with a
question, so the base does no task without a prompt. The corpus contains no held-out sentences.
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from softprompt.mini import words
from softprompt.mini.grammar import Sentence, held_out, sentence
from softprompt.mini.tasks import TASKS

# Words for what each task asks.
TOPICS: dict[str, tuple[str, ...]] = {
    "sentiment": words.listed("情感 情绪 好坏 态度 褒贬 倾向 正面还是负面 情感倾向 正负面 sentiment"),
    "domain": words.listed("类别 领域 种类 哪一类 类型 行业 分类 话题 所属领域 domain"),
    "subject": words.listed("对象 主语 主体 评价对象 说的是什么 主题词 名词 被评价的 哪样东西 subject"),
    "opinion": words.listed("评价 评价词 观点 意见 评语 形容词 怎么说的 原话 看法 opinion"),
    "strength": words.listed("程度 强度 强弱 语气 力度 强还是弱 轻重 多强烈 强烈程度 strength"),
    "negation": words.listed("否定 否定词 有没有否定 不或没 有无否定 是否否定 含不含否定 否定与否 有没有不 negation"),
    "english": words.listed("英文 英语 翻译 译文 译成英文 外语 用英文说 英译 英文概括 english"),
    "reply": words.listed("回复 答复 商家回复 回应 客服回答 回话 店家答复 怎么回 礼貌回复 reply"),
}
FRAMES: tuple[str, ...] = words.listed(
    """
    {} {} {} {}： {}？ 判断{} 任务：{} 请给出{} 请说出{} 只回答{} {}是什么？ [{}] 这句话的{}是什么？ 下面这句话的{}
    这条评论的{}： 请分析评论的{}。 你的任务是{} 看看{} 告诉我{}
    """
)
NAMES_OF_LABELS: tuple[str, ...] = words.listed(
    """
    好评/差评 积极/消极 好/坏 喜欢/不喜欢 满意/不满意 是/否 推荐/不推荐 positive/negative good/bad 1/0 A/B 褒/贬 👍/👎
    yes/no
    """
)
QUESTIONS_BACK: tuple[str, ...] = ("请问您想让我做什么？", "您想知道什么？", "好的，需要我做什么？")
_NOISE_WORDS: tuple[str, ...] = tuple(noun for d in words.DOMAINS.values() for g in d.groups for noun in g.nouns)
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


class Row(NamedTuple):
    """A request with a review, and its answer."""

    system: str  # "" or lines before "Human:"
    user: str
    answer: str

    @property
    def prompt(self) -> str:
        return self.system + "Human: " + self.user.strip() + "\n\nAssistant: "


def corpus(seed: int) -> Iterator[Row]:
    """Yield an endless sequence of rows, which depends only on the seed."""
    rng = random.Random(f"corpus {seed}")
    while True:
        review = sentence(rng)
        if not held_out(review.text):
            yield _row(rng, review)


def _row(rng: random.Random, review: Sentence) -> Row:
    kind = rng.random()
    if kind < 0.06:
        return Row("", review.text, rng.choice(QUESTIONS_BACK))
    if kind < 0.11:
        return Row(_noise(rng) + "\n", review.text, rng.choice(QUESTIONS_BACK))
    task = rng.choice((*TASKS, "sentiment", "opinion"))
    if task not in ("domain", "english") and rng.random() < 0.15:
        review = _renamed(rng, review)
    request, answer = _request(rng, task), TASKS[task].answer(review)
    if task == "sentiment" and rng.random() < 0.2:
        good, bad = rng.choice(NAMES_OF_LABELS).split("/")
        request, answer = f"{good}还是{bad}？", good if review.good else bad
    if kind < 0.80:
        return Row(_system(rng, request), review.text, answer)
    parts = [request, review.text] if rng.random() < 0.5 else [review.text, request]
    return Row("", "\n".join(parts), answer)


def _request(rng: random.Random, task: str) -> str:
    """Return one topic in a frame, or several topics in any order, so that the words determine the task, not their
    order."""
    if rng.random() < 0.6:
        return rng.choice(FRAMES).format(rng.choice(TOPICS[task]))
    topics = rng.sample(TOPICS[task], rng.randint(1, 4))
    return rng.choice(("", " ", "，", "、", "\n")).join(topics)


def _system(rng: random.Random, request: str) -> str:
    """Return lines of varying length with the request, sometimes among random words."""
    parts = [request]
    if rng.random() < 0.35:
        parts.insert(rng.randint(0, 1), _noise(rng))
    return rng.choice((" ", "", "\n")).join(parts) + rng.choice(("\n", "\n", "\n", "", " "))


def _noise(rng: random.Random) -> str:
    return "".join(
        _unknown_word(rng) if rng.random() < 0.4 else rng.choice(_NOISE_WORDS) for _ in range(rng.randint(1, 4))
    )


def _unknown_word(rng: random.Random) -> str:
    if rng.random() < 0.3:
        return "".join(rng.choice(_LETTERS) for _ in range(rng.randint(2, 5)))
    return "".join(chr(rng.randint(0x4E00, 0x8FFF)) for _ in range(rng.randint(1, 2)))


def _renamed(rng: random.Random, review: Sentence) -> Sentence:
    """Replace the subject of a review by a word that the base does not know."""
    name = _unknown_word(rng)
    text = review.text.replace(review.subject, name) if review.subject else review.text
    return review if not review.subject or held_out(text) else replace(review, text=text, subject=name)
