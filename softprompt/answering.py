"""From requests to the texts of their answers, in order, shown piece by piece where that is wished."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from softprompt.generate import Generator, in_order
from softprompt.requests import Request
from softprompt.streaming import Pieces

Search = Callable[[Request], list[list[int]]]  # a request with beams → its answers' token ids, best first


def answered(
    generator: Generator,
    search: Search,
    tokenizer: Any,
    asked: Sequence[Sequence[Request]],
    batch_size: int,
    on_text: Callable[[str], None] | None = None,
) -> Iterator[Any]:
    """To each question's requests (one a sample, or one for a whole search) a text, or a list of texts where several
    were asked for. `on_text` is handed the pieces of one text after the other as they come; a search has one piece."""
    pieces = Pieces(tokenizer, on_text) if on_text else None
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
