"""Answer a request in one piece or as a stream of server-sent events, and end it when its client goes away."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from softprompt.generation import requests as generation
from softprompt.serving.answer import Reply
from softprompt.serving.bodies import GenerationBody
from softprompt.serving.errors import ApiError, internal, timed_out
from softprompt.serving.formats import Format, usage, whole
from softprompt.serving.gate import notes
from softprompt.serving.service import Service
from softprompt.utils.errors import ConfigError

Result = TypeVar("Result")
EVENT_STREAM = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def service_of(request: Request) -> Service:
    """Return the service of the application that got the request."""
    return request.app.state.service


async def respond(
    request: Request,
    body: GenerationBody,
    form: Format,
    requests: Sequence[Sequence[generation.Request]],
    continues: bool,
) -> Response:
    """Answer the requests of each prompt, in one piece or as a stream.

    Args:
        request: The HTTP request.
        body: Its checked body.
        form: The format of the response.
        requests: For each prompt, the requests of its choices.
        continues: See `Answer`.

    Raises:
        ApiError: The queue is full; or the answer is not a stream, and it failed or took too long.
        ClientDisconnect: The answer is not a stream, and the client has gone away.
    """
    service = service_of(request)
    prompt_tokens = sum(len(of_prompt[0].input_ids) for of_prompt in requests)
    flat = [each for of_prompt in requests for each in of_prompt]
    reply = service.submit(flat, prompt_tokens, body.stop_strings, continues)
    notes(request.scope).update(stream=bool(body.stream))
    if body.stream:
        return ReplyStream(_stream(request, reply, form, body.wants_usage), lambda: _close(request, reply))
    try:
        await unless_gone(reply.wait_until_done(), request.receive)
        _raise_error(reply)
        return JSONResponse(whole(reply, form))
    except TimeoutError:
        raise timed_out(reply.seconds) from None
    finally:
        _close(request, reply)


class ReplyStream(StreamingResponse):
    """A response of events, which ends when the client goes away.

    Args:
        on_end: Called when the response ends for any reason, even if the client has not read it.
    """

    def __init__(self, events: AsyncIterator[str], on_end: Callable[[], object]):
        super().__init__(events, media_type="text/event-stream", headers=EVENT_STREAM)
        self.on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(self.stream_response(send), receive)
        except ClientDisconnect:
            notes(scope)["error"] = "client_disconnected"
        finally:
            self.on_end()


async def unless_gone(work: Coroutine[Any, Any, Result], receive: Receive) -> Result:
    """Wait for `work` and return its result, but give it up when the client goes away.

    Raises:
        ClientDisconnect: The client has gone away.
    """
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    """Wait until the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _stream(request: Request, reply: Reply, form: Format, with_usage: bool) -> AsyncIterator[str]:
    """Yield the events of a stream."""
    try:
        async for choice in _choices(reply, form):
            yield _event({**form.envelope(chunk=True), "choices": [choice], **({"usage": None} if with_usage else {})})
        if with_usage:
            total = usage(reply.prompt_tokens, reply.tokens)
            yield _event({**form.envelope(chunk=True), "choices": [], "usage": total})
        yield "data: [DONE]\n\n"
    except ApiError as error:
        notes(request.scope)["error"] = error.code
        yield _event(error.body())


async def _choices(reply: Reply, form: Format) -> AsyncIterator[dict[str, Any]]:
    """Yield the parts of the choices as they come.

    Raises:
        ApiError: An answer failed, or the deadline has passed.
    """
    for index in range(len(reply.answers)):
        if first := form.first(index):
            yield first
    ended: set[int] = set()
    while len(ended) < len(reply.answers):
        _raise_error(reply)
        for index, answer in enumerate(reply.answers):
            reason, piece = answer.finish_reason, answer.take()
            if piece.text or piece.logprobs:
                yield form.delta(index, piece, None)
            if reason and index not in ended:
                ended.add(index)
                yield form.delta(index, answer.take(), reason)
        if len(ended) < len(reply.answers):
            try:
                await reply.wait_for_change()
            except TimeoutError:
                raise timed_out(reply.seconds) from None


def _raise_error(reply: Reply) -> None:
    """Raise what went wrong with an answer as an ApiError. A ConfigError is about the request, so its message is sent
    to the client. Other messages are not, because they may contain paths."""
    if reply.error is None:
        return
    if isinstance(reply.error, ConfigError):
        raise ApiError(400, str(reply.error), code="invalid_value")
    raise internal()


def _close(request: Request, reply: Reply) -> None:
    """Close a reply, and add to the log how many tokens it had and why it ended."""
    service, told = service_of(request), notes(request.scope)
    service.close(reply)
    reasons = sorted({answer.finish_reason or "canceled" for answer in reply.answers})
    told.update(prompt_tokens=reply.prompt_tokens, completion_tokens=reply.tokens, finish_reason=",".join(reasons))
    if reply.first_token is not None:
        seconds = reply.first_token - reply.started
        told["first_token_seconds"] = round(seconds, 4)
        service.metrics.first_token_seconds.observe(seconds)


def _event(values: dict[str, Any]) -> str:
    return f"data: {json.dumps(values, ensure_ascii=False, allow_nan=False)}\n\n"
