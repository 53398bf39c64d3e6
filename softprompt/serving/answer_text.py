"""Text of an answer, token by token: whole characters, stop strings, and white space at the ends."""

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Detokenize incrementally: a character is returned only when all of its tokens have arrived.

    Each call decodes only the tokens after the last point at which the text was complete, and a few tokens before it,
    because some tokenizers decode a token differently at the beginning of a text.

    Args:
        context: The last tokens of the text that the answer continues; empty if the answer is decoded as the beginning
            of a text.
    """

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()):
        self._tokenizer, self._ids = tokenizer, list(context)
        self._passed = self._decode()
        if self._passed.endswith(REPLACEMENT):  # the context ends within a character
            self._ids, self._passed = [], ""
        self._context = len(self._ids)  # tokens at the beginning of `_ids` whose text has been returned

    def add(self, token: int) -> str:
        """Add a token; return the text that is complete with it, which may be empty."""
        self._ids.append(token)
        text = self._decode()
        # In UTF-8, a character has at most four bytes, so only the last three replacement characters can still change.
        whole = len(text.rstrip(REPLACEMENT))
        piece = text[len(self._passed) : max(whole, len(text) - 3)]
        self._passed += piece
        if len(self._passed) == len(text):
            keep = len(self._ids) - self._context
            self._ids, self._context = self._ids[-keep:], keep
            self._passed = self._decode()
        return piece

    def finish(self) -> str:
        """Return the text that was held back: a replacement character for each incomplete character."""
        text = self._decode()
        piece, self._passed = text[len(self._passed) :], text
        return piece

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=True)


class StopStrings:
    """Find the first occurrence of any stop string in a text that arrives in pieces."""

    def __init__(self, stops: Sequence[str]):
        self._stops, self._held = stops, ""
        self.found = False

    def add(self, piece: str) -> str:
        """Add a piece; return the text that is certainly before the first stop string."""
        text = self._held + piece
        starts = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if starts:
            self.found, self._held = True, ""
            return text[: min(starts)]
        held = max((self._beginning(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """Return the text that was held back."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _beginning(text: str, stop: str) -> int:
        """Return the length of the longest suffix of `text` that is a proper prefix of `stop`."""
        longest = min(len(stop) - 1, len(text))
        return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class Strip:
    """Strip white space at both ends of a text that arrives in pieces, as infer.py does for whole texts."""

    def __init__(self, active: bool):
        self._active, self._started, self._held = active, False, ""

    def add(self, piece: str) -> str:
        """Add a piece; return the text that is certainly not white space at an end."""
        if not self._active:
            return piece
        text = self._held + piece if self._started else piece.lstrip()
        shown = text.rstrip()
        self._started, self._held = self._started or bool(shown), text[len(shown) :]
        return shown
