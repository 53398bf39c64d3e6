"""The texts that make a base write questions about a document, and the parsing of its answers (self-study: Eyuboglu et
al. 2025, arXiv:2506.06266)."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from softprompt.data.encoding import prompt_ids
from softprompt.data.language import language_of
from softprompt.data.template import CHAT, Template

PASSAGE_TOKENS, QUESTION_TOKENS = 200, 48  # the most tokens of a passage, and of a question about it


class Wording(NamedTuple):
    """How a question about a passage is asked for in one language.

    Do not change these texts. They are part of the keys of cached answers, so a run of an earlier version would have to
    generate its questions anew when it is resumed.

    Attributes:
        request: What a chat's user writes below the passage.
        beginning: What stands between the passage and the question in a text that the base continues.
    """

    request: str
    beginning: str


ENGLISH = Wording(
    "Write one short question that the text above answers. Write only the question.", "A question about this text: "
)
CHINESE = Wording("请写一个能用上文回答的简短问题。只写问题本身。", "关于这段文字的一个问题：")


def questions_about(text: str, ids: Sequence[int], tokenizer: Any, template: Template, most: int) -> list[list[int]]:
    """Cut a text into passages, and return for each the token ids that make a base write a question about it. Of more
    than `most` passages, that many are taken, evenly spaced. The request is in Chinese for a Chinese text, else in
    English.

    With the template "chat", the token ids are a request in the tokenizer's chat template, else the beginning of a text
    in which a question follows the passage.

    Args:
        ids: The text as token ids, at least one.
    """
    starts = range(0, len(ids), PASSAGE_TOKENS)
    taken = min(most, len(starts))
    starts = [starts[number * len(starts) // taken] for number in range(taken)]
    passages = [tokenizer.decode(ids[at : at + PASSAGE_TOKENS]).strip() for at in starts]
    wording = CHINESE if language_of([{"text": text}]) == "zh" else ENGLISH
    if template.spec == CHAT:
        texts = [template.render({"instruction": f"{passage}\n\n{wording.request}"}, tokenizer) for passage in passages]
    else:
        texts = [f"{passage}\n\n{wording.beginning}" for passage in passages]
    return prompt_ids(tokenizer, texts, template)


def written_questions(answers: Iterable[Sequence[int]], tokenizer: Any) -> list[str]:
    """Return the questions in a base's answers, each once: the first line of each answer, without a number or
    "Question:" before it and without quotation marks and asterisks around it. A line that ends with a colon only
    announces a question and is left out."""
    texts = (tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers)
    lines = (_without_marks(text.splitlines()[0]) for text in texts if text)
    return list(dict.fromkeys(line for line in lines if line and line[-1] not in ":："))


# A number, a bullet or "Question:" before a question.
PREFIX = re.compile(
    r"[\s*]*(?:(?:Question|Q|问题|问)\s*[\d一二三四五六七八九十]*[*\s]*[:：.]|\d+(?:[.)](?=\D)|、)|[（(]\d+[)）]|[-•]\s)[\s*]*"
)
PAIRS = {"**": "**", "*": "*", '"': '"', "'": "'", "“": "”", "‘": "’", "「": "」"}


def _without_marks(line: str) -> str:
    """Strip numbers, labels, quotation marks and asterisks around a question, but not those of a part of it."""
    before = ""
    while line != before:
        before, stripped = line, line.strip()
        found = PREFIX.match(stripped)
        line = _without_pair(stripped[found.end() if found else 0 :])
    return line


def _without_pair(text: str) -> str:
    """Strip a pair of marks around a text, or a mark at one end whose partner is missing."""
    for opening, closing in PAIRS.items():
        inner = text[len(opening) : -len(closing)]
        if text.startswith(opening) and text.endswith(closing) and not (opening in inner or closing in inner):
            return inner
        alone = text.count(closing) == 1 if opening == closing else opening not in text
        if text.endswith(closing) and alone:
            return text[: -len(closing)]
        alone = text.count(opening) == 1 if opening == closing else closing not in text
        if text.startswith(opening) and alone and opening != "'":  # an apostrophe, as in 'tis
            return text[len(opening) :]
    return text
