"""From requests to the texts of their answers, in order, shown piece by piece where that is wished."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import TextStreamer

from softprompt.generation.hf_generate import Generator, in_order
from softprompt.generation.requests import Request

Search = Callable[[Request], list[list[int]]]  # a request with beams → its answers' token ids, best first


def stream_answers(
    generator: Generator,
    search: Search,
    tokenizer: Any,
    asked: Sequence[Sequence[Request]],
    batch_size: int,
    on_text: Callable[[str], None] | None = None,
) -> Iterator[Any]:
    """To each question's requests (one a sample, or one for a whole search) a text, or a list of texts where several
    were asked for. `on_text` is handed the pieces of one text after the other as they come; a search has one piece."""
    pieces = TextStream(tokenizer, on_text) if on_text else None
    on_token = (lambda _, token: pieces.add(token)) if pieces else None
    drawn = [request for requests in asked for request in requests if request.settings.num_beams == 1]
    written = in_order(generator.generate(drawn, batch_size, on_token))
    for requests in asked:
        settings = requests[0].settings
        found = search(requests[0]) if settings.num_beams > 1 else [next(written) for _ in requests]
        if pieces:
            for token in found[0] if settings.num_beams > 1 else ():
                pieces.add(token)
            pieces.finish()
        texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in found]
        yield texts if settings.num_return_sequences > 1 else texts[0]


class TextStream(TextStreamer):
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
