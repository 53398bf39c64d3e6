"""ASGI middleware for every HTTP request: it checks the API key, refuses requests during shutdown, limits their
duration, and writes log and metrics.

One line of JSON is logged for each request; it contains no texts and no keys.
"""

import asyncio
import hmac
import json
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Callable, Collection, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from softprompt.serving.errors import ApiError, internal, unavailable
from softprompt.serving.service import Service
from softprompt.utils.redact import redacted
from softprompt.utils.std_streams import tell

NOTES = "softprompt.notes"  # key in the ASGI scope; its value is what the log says about the request
OPEN = ("/health",)  # routes that need no key
BODY_SECONDS = 30  # within which a body must arrive
SENDING_SECONDS = 30  # within which a client must read the rest of an answer after its end
CLOSED_BY_CLIENT = 499  # nginx's status of a request whose client went away before the response began


def notes(scope: MutableMapping[str, Any]) -> dict[str, Any]:
    """Return a dict with what the log will say about a request, which may be extended."""
    return scope.setdefault(NOTES, {})


class Gate:
    """Checks and logs requests.

    Args:
        app: The application. It answers the requests that this class does not refuse.
        service: Gives the API key, the timeout and the metrics.
        routes: The paths that metrics name; other paths are counted as "other".
        log: Called with the line of each request.

    Attributes:
        open: Number of requests that are being answered.
        draining: Whether new requests are refused, because the server is shutting down.
    """

    def __init__(self, app: ASGIApp, service: Service, routes: Collection[str], log: Callable[[str], object]):
        self.app, self.service, self.routes, self.log = app, service, routes, log
        self.metrics = service.metrics
        self.api_key = service.arguments.api_key
        self.seconds = BODY_SECONDS + service.arguments.request_timeout + SENDING_SECONDS
        self.open, self.draining = 0, False
        self._limits = set[asyncio.Timeout]()  # of the requests that are being answered
        self.on_idle: Callable[[], object] = lambda: None
        self._closing: asyncio.Task[None] | None = None  # kept, because the event loop only refers to it weakly

    def drain(self, on_idle: Callable[[], object]) -> None:
        """Refuse new requests; call `on_idle` when the last one has been answered. When all answers are generated,
        clients have `SENDING_SECONDS` to read them."""
        self.draining, self.on_idle = True, on_idle
        if self.open:
            self._closing = asyncio.create_task(self._give_up_on_readers())
        else:
            on_idle()

    async def _give_up_on_readers(self) -> None:
        """End the requests that are still open `SENDING_SECONDS` after the last answer has been generated."""
        generated = time.monotonic()
        while time.monotonic() < generated + SENDING_SECONDS:
            await asyncio.sleep(0.1)
            if self.service.unfinished:
                generated = time.monotonic()
        for limit in self._limits:
            limit.reschedule(0.0)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 0
        request_id = f"req-{uuid.uuid4().hex}"

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        self.open += 1
        try:
            if refused := self._refusal(scope):
                await error_response(refused)(scope, receive, noting)
            else:
                async with self._limited():  # also limits a client that does not read
                    await self.app(scope, receive, noting)
        except (ClientDisconnect, TimeoutError) as error:
            notes(scope)["error"] = "timeout" if isinstance(error, TimeoutError) else "client_disconnected"
        except Exception as error:
            traceback_lines = "".join(traceback.format_exception(error))
            tell(redacted(traceback_lines))
            notes(scope)["error"] = type(error).__name__
            if not status:
                await error_response(internal())(scope, receive, noting)
        finally:
            self.open -= 1
            self._note(scope, request_id, status or CLOSED_BY_CLIENT, started)
            if self.draining and not self.open:
                self.on_idle()

    @asynccontextmanager
    async def _limited(self) -> AsyncIterator[None]:
        """Raise TimeoutError after the time of a request, or when a shutdown gives up on it."""
        async with asyncio.timeout(self.seconds) as limit:
            self._limits.add(limit)
            try:
                yield
            finally:
                self._limits.discard(limit)

    def _refusal(self, scope: Scope) -> ApiError | None:
        """Return the error with which a request is refused; None if it is not refused."""
        if self.draining:
            return unavailable("The server is shutting down.")
        if self.api_key is None or scope["path"] in OPEN or self._is_static(scope):
            return None
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if hmac.compare_digest(given, b"Bearer " + self.api_key.encode()):
            return None
        return ApiError(
            401,
            "Incorrect API key provided. Send the header `Authorization: Bearer KEY`.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def _is_static(self, scope: Scope) -> bool:
        """Whether the path is outside of the API: it is unknown, or a file of the page, which needs no key."""
        return scope["path"] not in self.routes and not scope["path"].startswith("/v1")

    def _note(self, scope: Scope, request_id: str, status: int, started: float) -> None:
        seconds, told, path = time.monotonic() - started, notes(scope), scope["path"]
        route = path if path in self.routes else "other"
        self.metrics.requests[route, status] += 1
        self.metrics.seconds.observe(seconds)
        client = scope.get("client")
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "id": request_id,
            "client": client[0] if client else None,
            "method": scope["method"],
            "path": path[:200],
            "status": status,
            "seconds": round(seconds, 4),
            **told,
        }
        self.log(json.dumps(line, ensure_ascii=True))


def error_response(error: ApiError) -> JSONResponse:
    """Return the response that reports an error."""
    return JSONResponse(error.body(), error.status, error.headers)
