"""The answers of a request while they are being generated, as the event loop sees them.

The model thread passes tokens to the event loop, which turns them into text at once, whether or not the client reads
it. So a client that reads slowly delays no other request, and a stop string ends its answer immediately. At most one
answer of `max_tokens` tokens is buffered for each choice.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from softprompt.generation.logprobs import TokenLogprob
from softprompt.generation.requests import Request
from softprompt.generation.sampling import RequestState
from softprompt.serving.answer_text import Detokenizer, StopStrings, Strip

CONTEXT = 5  # prompt tokens decoded before a continuation: its first token's text may depend on them


class Piece(NamedTuple):
    """A part of an answer: its text, and the log-probabilities of its tokens if they are recorded."""

    text: str
    logprobs: list[TokenLogprob]


class Answer:
    """One answer of a reply. Only the event loop may use it, but the model thread reads `request` and `canceled`, and
    sets `state`.

    Args:
        stops: Texts that end the answer and are not part of it.
        continues: Whether the answer is a continuation of the request's text. If not, it is a text of its own, and
            white space at both ends is stripped.

    Attributes:
        request: The request that the model thread answers.
        state: The request's state in the running batch; None before it has joined.
        canceled: Whether the answer is no longer needed.
        text: The text so far.
        tokens: Number of tokens so far.
        logprobs: Log-probabilities of the tokens so far, if they are recorded.
        finish_reason: "stop" or "length" at the end, else None.
        error: The exception that ended the answer, else None.
        on_change: Called in the event loop after each change.
    """

    def __init__(self, request: Request, tokenizer: Any, stops: Sequence[str], continues: bool):
        self.request, self.canceled = request, False
        self.state: RequestState | None = None
        self.text, self.tokens, self.logprobs = "", 0, list[TokenLogprob]()
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self.on_change: Callable[[], object] = lambda: None
        self._detokenizer = Detokenizer(tokenizer, request.input_ids[-CONTEXT:] if continues else ())
        self._stops, self._strip = StopStrings(stops), Strip(not continues)
        self._taken = (0, 0)  # characters and log-probabilities that `take` has returned

    @property
    def done(self) -> bool:
        """Whether the answer has ended, with or without an error."""
        return self.finish_reason is not None or self.error is not None

    def cancel(self) -> None:
        """Free the answer's place in the running batch."""
        self.canceled = True
        if self.state is not None:
            self.state.cancel()

    def add(self, token: int, logprob: TokenLogprob | None) -> None:
        """Add a token that the model thread generated."""
        if self.done:
            return
        self.tokens += 1
        self.logprobs += [logprob] if logprob else []
        self._show(self._stops.add(self._detokenizer.add(token)))
        if self._stops.found:
            self.cancel()
            self.finish_reason = "stop"
        self.on_change()

    def end(self, reason: str) -> None:
        """End the answer. `reason` is a value of `RequestState.finish_reason`."""
        if self.done:
            return
        self._show(self._stops.add(self._detokenizer.finish()))
        self.finish_reason = "stop" if self._stops.found else reason
        self._show(self._stops.finish())
        self.on_change()

    def fail(self, error: Exception) -> None:
        """End the answer with an error."""
        if not self.done:
            self.error = error
            self.on_change()

    def take(self) -> Piece:
        """Return the text and the log-probabilities that were added since the last call."""
        text, logprobs = self._taken
        self._taken = len(self.text), len(self.logprobs)
        return Piece(self.text[text:], self.logprobs[logprobs:])

    def _show(self, piece: str) -> None:
        self.text += self._strip.add(piece)


class Reply:
    """The answers of one HTTP request.

    Attributes:
        answers: The answers, in the order of their choices.
        prompt_tokens: Number of tokens of the prompts.
        seconds: The timeout in seconds, counted from `started`.
        started: The time of submission in seconds, by `time.monotonic`.
        first_token: The time of the first token, by the same clock; None before it.
    """

    def __init__(self, answers: Sequence[Answer], prompt_tokens: int, seconds: float):
        self.answers, self.prompt_tokens, self.seconds = list(answers), prompt_tokens, seconds
        self.started = time.monotonic()
        self.first_token: float | None = None
        self._changed, self._done = asyncio.Event(), asyncio.Event()
        for answer in answers:
            answer.on_change = self._on_change

    @property
    def done(self) -> bool:
        """Whether all answers have ended."""
        return all(answer.done for answer in self.answers)

    @property
    def tokens(self) -> int:
        """Number of tokens of all answers so far."""
        return sum(answer.tokens for answer in self.answers)

    @property
    def error(self) -> Exception | None:
        """The error of the first answer that failed; None if none did."""
        return next((answer.error for answer in self.answers if answer.error), None)

    def _on_change(self) -> None:
        if self.first_token is None and self.tokens:
            self.first_token = time.monotonic()
        self._changed.set()
        if self.done:
            self._done.set()

    async def wait_for_change(self) -> None:
        """Wait until an answer has changed since the last call.

        Raises:
            TimeoutError: The time of the reply has passed.
        """
        await self._wait(self._changed)
        self._changed.clear()

    async def wait_until_done(self) -> None:
        """Wait until all answers are done.

        Raises:
            TimeoutError: The time of the reply has passed.
        """
        await self._wait(self._done)

    async def _wait(self, event: asyncio.Event) -> None:
        async with asyncio.timeout(self.started + self.seconds - time.monotonic()):
            await event.wait()

    def cancel(self) -> None:
        """Cancel all answers that are not done, which frees their places in the running batch."""
        for answer in self.answers:
            if not answer.done:
                answer.cancel()
