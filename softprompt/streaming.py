"""An answer's text as it is written: whole characters, and in the end the text that a finished answer has."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import TextStreamer


class Pieces(TextStreamer):
    """transformers' TextStreamer, which waits for whole words and Chinese characters, to a function instead of stdout,
    and without the white space at an answer's ends."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]):
        super().__init__(tokenizer, skip_special_tokens=True)
        self._on_text, self._begun, self._space = on_text, False, ""

    def add(self, token: int) -> None:
        self.put(torch.tensor([token]))

    def finish(self) -> None:
        """What is still held back; the next token begins another answer."""
        self.end()
        self._begun, self._space = False, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = self._space + text if self._begun else text.lstrip()
        shown = text.rstrip()
        if shown:
            self._on_text(shown)
        self._begun, self._space = self._begun or bool(shown), text[len(shown) :]
