"""Responses in the formats of OpenAI's API: whole, and as the chunks of a stream."""

import re
import time
import uuid
from functools import lru_cache
from typing import Any, Protocol

from softprompt.generation.likelihood import ChoiceResult
from softprompt.generation.logprobs import TokenLogprob
from softprompt.serving.answer import Answer, Piece, Reply
from softprompt.serving.registry import Served

Json = dict[str, Any]
LEAST = -9999.0  # the lowest log-probability that is sent, since JSON cannot represent -inf


class Format(Protocol):
    """How the choices of a reply are written."""

    def envelope(self, chunk: bool) -> Json:
        """Return the fields of a response, or of a chunk of a stream, other than `choices` and `usage`."""
        ...

    def choice(self, index: int, answer: Answer) -> Json:
        """Return the JSON of a finished choice."""
        ...

    def first(self, index: int) -> Json | None:
        """Return the chunk of a choice that precedes its text in a stream; None if the format has none."""
        ...

    def delta(self, index: int, piece: Piece, finish_reason: str | None) -> Json:
        """Return the chunk of a choice that holds a piece of its text or, with `finish_reason`, ends it."""
        ...


class ChatFormat:
    """The format of /v1/chat/completions."""

    def __init__(self, model: str, tokenizer: Any, logprobs: bool):
        self.id, self.created, self.model = f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), model
        self.tokenizer, self.logprobs = tokenizer, logprobs

    def envelope(self, chunk: bool) -> Json:
        """See `Format.envelope`."""
        kind = "chat.completion.chunk" if chunk else "chat.completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def choice(self, index: int, answer: Answer) -> Json:
        """See `Format.choice`."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        logprobs = self._logprobs(answer.logprobs)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": answer.finish_reason}

    def first(self, index: int) -> Json | None:
        """See `Format.first`."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(self, index: int, piece: Piece, finish_reason: str | None) -> Json:
        """See `Format.delta`."""
        delta = {} if finish_reason else {"content": piece.text}
        logprobs = self._logprobs(piece.logprobs) if piece.logprobs else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, tokens: list[TokenLogprob]) -> Json | None:
        if not self.logprobs:
            return None
        content = [
            {**self._token(each.token, each.logprob), "top_logprobs": [self._token(*other) for other in each.top]}
            for each in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> Json:
        raw = token_bytes(self.tokenizer, token)
        return {"token": _shown(raw), "logprob": max(logprob, LEAST), "bytes": list(raw)}


class CompletionFormat:
    """The format of /v1/completions."""

    def __init__(self, model: str, tokenizer: Any, logprobs: bool):
        self.id, self.created, self.model = f"cmpl-{uuid.uuid4().hex}", int(time.time()), model
        self.tokenizer, self.logprobs = tokenizer, logprobs
        self._offsets: dict[int, int] = {}  # characters of each choice's tokens so far

    def envelope(self, chunk: bool) -> Json:
        """See `Format.envelope`."""
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}

    def choice(self, index: int, answer: Answer) -> Json:
        """See `Format.choice`."""
        return self.delta(index, Piece(answer.text, answer.logprobs), answer.finish_reason)

    def first(self, index: int) -> Json | None:
        """See `Format.first`."""
        return None

    def delta(self, index: int, piece: Piece, finish_reason: str | None) -> Json:
        """See `Format.delta`."""
        logprobs = self._logprobs(index, piece.logprobs)
        return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, index: int, tokens: list[TokenLogprob]) -> Json | None:
        if not self.logprobs:
            return None
        texts, offsets, offset = [self._text(each.token) for each in tokens], [], self._offsets.get(index, 0)
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        self._offsets[index] = offset
        return {
            "tokens": texts,
            "token_logprobs": [max(each.logprob, LEAST) for each in tokens],
            "top_logprobs": [{self._text(t): max(logprob, LEAST) for t, logprob in each.top} for each in tokens],
            "text_offset": offsets,
        }

    def _text(self, token: int) -> str:
        return _shown(token_bytes(self.tokenizer, token))


def whole(reply: Reply, form: Format) -> Json:
    """Return the body of a response that is not streamed."""
    choices = [form.choice(index, answer) for index, answer in enumerate(reply.answers)]
    return {**form.envelope(chunk=False), "choices": choices, "usage": usage(reply.prompt_tokens, reply.tokens)}


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
    """Return the numbers of tokens of prompt and completion, without virtual tokens."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def model_card(served: Served) -> Json:
    """Return an entry of /v1/models."""
    return {"id": served.name, "object": "model", "created": served.created, "owned_by": "softprompt"}


def classification(model: str, results: list[ChoiceResult], prompt_tokens: int) -> Json:
    """Return the body of /v1/classify."""
    data = [
        {
            "index": index,
            "label": result.label,
            "probability": result.probability,
            "choices": [{"choice": choice, "probability": p} for choice, p in result.probabilities.items()],
        }
        for index, result in enumerate(results)
    ]
    return {
        "id": f"classify-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": data,
        "usage": usage(prompt_tokens, 0),
    }


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """Return the UTF-8 bytes that a token stands for. The bytes of a token that is only part of a character are read
    from its name: symbols of GPT-2's byte table, or <0xE4> as in vocabularies of SentencePiece."""
    text = tokenizer.decode([token])
    name = tokenizer.convert_ids_to_tokens(token) or ""
    if "\N{REPLACEMENT CHARACTER}" not in text:
        return text.encode()
    if found := re.fullmatch(r"<0x([0-9A-F]{2})>", name):
        return bytes([int(found[1], 16)])
    table = _byte_of()
    return bytes(table[c] for c in name) if all(c in table for c in name) else text.encode()


@lru_cache(maxsize=1)
def _byte_of() -> dict[str, int]:
    """Return the byte that each character of GPT-2's table stands for: a printable byte is its own character, and the
    other bytes are the characters from 256 on, in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(256 + n): byte for n, byte in enumerate(others)}}


def _shown(raw: bytes) -> str:
    """Return bytes as text; bytes that are not valid UTF-8 are escaped in OpenAI's notation, which begins with
    `bytes:`."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
