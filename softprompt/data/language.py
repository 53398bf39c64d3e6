"""Guess the language of rows: Chinese, English, or unknown."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

HAN, OF_JAPANESE_OR_KOREAN = r"[\u4e00-\u9fff]", r"[\u3040-\u30ff\uac00-\ud7af]"
COMMON_WORDS = "the a an of to and in is are was for that this it with on as you i what how not be"
ENGLISH = frozenset(COMMON_WORDS.split())
# A text is Chinese if this share of its letters are Chinese characters, and English if this share of its words are the
# commonest English ones. Other languages in Latin letters have hardly any of these.
LEAST_HAN, LEAST_ENGLISH = 0.3, 0.15
LEAST_LETTERS = 10  # in shorter texts, the shares mean little


def language_of(rows: Iterable[Mapping[str, Any]]) -> str | None:
    """Return the ISO 639-1 code of the rows' language, `zh` or `en`; None if it is neither, both or unclear."""
    text = " ".join(value for row in rows for value in row.values() if isinstance(value, str)).lower()
    letters = len(re.findall(r"[^\W\d_]", text))
    if letters < LEAST_LETTERS or re.search(OF_JAPANESE_OR_KOREAN, text):
        return None
    if len(re.findall(HAN, text)) >= LEAST_HAN * letters:
        return "zh"
    words = re.findall(r"[^\W\d_]+", text)
    return "en" if sum(word in ENGLISH for word in words) >= LEAST_ENGLISH * len(words) else None
