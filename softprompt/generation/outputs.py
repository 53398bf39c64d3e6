"""Generate the answers to requests as texts, in the order of the questions, optionally streamed piece by piece."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import TextStreamer

from softprompt.generation.generator import Generator, in_request_order
from softprompt.generation.requests import Request

BeamSearch = Callable[[Request], list[list[int]]]  # request → token ids of its answers, the best first


def stream_answers(
    generator: Generator,
    beam_search: BeamSearch,
    tokenizer: Any,
    requests: Sequence[Sequence[Request]],
    batch_size: int,
    on_text: Callable[[str], None] | None = None,
) -> Iterator[Any]:
    """Answer each question; yield a text, or a list of texts if `num_return_sequences` is above 1.

    Args:
        requests: For each question one request per sample, or a single one for beam search.
        batch_size: Maximum number of answers that are generated at the same time.
        on_text: Called with each piece of the answer as it is generated; with beam search, after the search. Give it
            only for a single answer, because the tokens of parallel answers are not distinguished.

    Raises:
        ConfigError, TrainingError: See `Generator.generate`.
    """
    streamer = CallbackStreamer(tokenizer, on_text) if on_text else None
    on_token = (lambda _, token: streamer.add(token)) if streamer else None
    to_generate = [request for samples in requests for request in samples if request.settings.num_beams == 1]
    generated = in_request_order(generator.generate(to_generate, batch_size, on_token))
    for samples in requests:
        settings = samples[0].settings
        answers = beam_search(samples[0]) if settings.num_beams > 1 else [next(generated) for _ in samples]
        if streamer:
            for token in answers[0] if settings.num_beams > 1 else ():
                streamer.add(token)
            streamer.finish()
        texts = [tokenizer.decode(token_ids, skip_special_tokens=True).strip() for token_ids in answers]
        yield texts if settings.num_return_sequences > 1 else texts[0]


class CallbackStreamer(TextStreamer):
    """A TextStreamer of transformers that calls a function instead of printing.

    Text is held back until a word or a Chinese character is complete. White space at both ends of an answer is omitted.
    """

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]):
        super().__init__(tokenizer, skip_special_tokens=True)
        self._on_text, self._started, self._held_space = on_text, False, ""

    def add(self, token: int) -> None:
        """Add the next token of the answer."""
        self.put(torch.tensor([token]))

    def finish(self) -> None:
        """Flush the text that is held back; the next token starts another answer."""
        self.end()
        self._started, self._held_space = False, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass on a piece, but hold back white space at its end, which is omitted if the answer ends there."""
        text = self._held_space + text if self._started else text.lstrip()
        shown = text.rstrip()
        if shown:
            self._on_text(shown)
        self._started, self._held_space = self._started or bool(shown), text[len(shown) :]
