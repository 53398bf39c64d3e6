"""The routes of the server."""

import asyncio
import json
import re

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from softprompt.serving.bodies import (
    AdapterBody,
    BodyType,
    ChatBody,
    ClassifyBody,
    CompletionBody,
    parse_body,
)
from softprompt.serving.errors import ApiError, internal, timed_out
from softprompt.serving.formats import (
    ChatFormat,
    CompletionFormat,
    classification,
    model_card,
)
from softprompt.serving.gate import BODY_SECONDS, CLOSED_BY_CLIENT, error_response, notes
from softprompt.serving.metrics import CONTENT_TYPE
from softprompt.serving.page import add_page
from softprompt.serving.respond import respond, service_of, unless_gone
from softprompt.serving.service import Service

HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")  # the escape of a UTF-16 surrogate, which is valid only in a pair
ROUTES = {
    *("/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/classify", "/v1/adapters", "/health", "/metrics"),
}


def make_app(service: Service) -> FastAPI:
    """Return the ASGI application, which answers requests with `service`."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _routing_error)
    app.add_exception_handler(ClientDisconnect, _disconnected)
    app.add_exception_handler(Exception, _internal_error)
    app.add_api_route("/health", health, methods=["GET"])
    app.add_api_route("/metrics", metrics, methods=["GET"])
    app.add_api_route("/v1/models", models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", model, methods=["GET"])
    app.add_api_route("/v1/chat/completions", chat_completions, methods=["POST"])
    app.add_api_route("/v1/completions", completions, methods=["POST"])
    app.add_api_route("/v1/classify", classify, methods=["POST"])
    app.add_api_route("/v1/adapters", load_adapter, methods=["POST"])
    add_page(app)
    return app


async def health(request: Request) -> Response:
    """Report that the server is up. While it shuts down, `gate` refuses this request like any other, with 503."""
    return JSONResponse({"status": "ok"})


async def metrics(request: Request) -> Response:
    """Return the metrics in Prometheus' text format."""
    service = service_of(request)
    return PlainTextResponse(service.metrics.text(service.gauges()), media_type=CONTENT_TYPE)


async def models(request: Request) -> Response:
    """List the base and its adapters."""
    service = service_of(request)
    served = [service.base, *await service.in_worker(service.registry.all)]
    return JSONResponse({"object": "list", "data": [model_card(each) for each in served]})


async def model(request: Request, name: str) -> Response:
    """Describe the base or an adapter."""
    return JSONResponse(model_card(await service_of(request).find(name)))


async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    service, body = service_of(request), await _body(request, ChatBody)
    served = await service.find(body.model)
    service.check_queue(n=body.n or 1)
    requests = await service.in_worker(service.encoder.chat, body, served.adapter, service.seed(body.seed))
    form = ChatFormat(body.model, service.model.tokenizer, body.top is not None)
    return await respond(request, body, form, [requests], continues=False)


async def completions(request: Request) -> Response:
    """Continue texts."""
    service, body = service_of(request), await _body(request, CompletionBody)
    served = await service.find(body.model)
    service.check_queue(prompt=len(body.prompts), n=body.n or 1)
    requests = await service.in_worker(service.encoder.completion, body, served.adapter, service.seed(body.seed))
    form = CompletionFormat(body.model, service.model.tokenizer, body.top is not None)
    return await respond(request, body, form, requests, continues=True)


async def classify(request: Request) -> Response:
    """Return, for each question, the most likely choice and the probability of each choice."""
    service, body = service_of(request), await _body(request, ClassifyBody)
    served = await service.find(body.model)
    service.check_queue(input=len(body.conversations), choices=len(body.choices))
    examples, tokens = await service.in_worker(service.encoder.classification, body, served.adapter)
    notes(request.scope).update(prompt_tokens=tokens)
    try:
        async with asyncio.timeout(service.arguments.request_timeout):
            results = await unless_gone(service.classify(served.adapter, examples, body.choices), request.receive)
    except TimeoutError:
        raise timed_out(service.arguments.request_timeout) from None
    service.metrics.prompt_tokens += tokens
    return JSONResponse(classification(body.model, results, tokens))


async def load_adapter(request: Request) -> Response:
    """Serve one more adapter under a name that the request chooses. Its folder must be inside one of --adapters."""
    service = service_of(request)
    if not service.arguments.allow_adapter_loading:
        raise ApiError(403, "This server was started without --allow_adapter_loading.", code="not_allowed")
    body = await _body(request, AdapterBody)
    try:
        served = await service.in_worker(service.registry.add, body.name, body.folder)
    except ValueError as error:
        raise ApiError(400, f"The adapter cannot be loaded: {error}.", code="invalid_value") from None
    return JSONResponse(model_card(served))


async def _body(request: Request, kind: type[BodyType]) -> BodyType:
    """Read, parse and check the body of a request.

    Raises:
        ApiError: The body is too large, arrives too slowly, is not JSON, or does not match `kind`.
    """
    limit = service_of(request).arguments.max_body_bytes
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # Against cross-site requests: a browser lets any web page send other types without a CORS preflight request.
        raise ApiError(415, "Send the header `Content-Type: application/json`.", code="unsupported_media_type")
    content = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                content += chunk
                if len(content) > limit:
                    raise ApiError(413, f"The body is larger than {limit:,} bytes.", code="request_too_large")
    except TimeoutError:
        raise ApiError(408, f"The body did not arrive within {BODY_SECONDS} seconds.", code="timeout") from None
    try:
        values = json.loads(content.decode())
        if HALF_CHARACTER.search(content):
            json.dumps(values, ensure_ascii=False).encode()  # raises a ValueError for an unpaired surrogate
    except (ValueError, RecursionError):
        raise ApiError(400, "We could not parse the JSON body of your request.", code="invalid_json") from None
    if not isinstance(values, dict):
        raise ApiError(400, "The JSON body of your request must be an object.", code="invalid_json")
    body = parse_body(kind, values)
    notes(request.scope).update(model=getattr(body, "model", "")[:200])
    return body


async def _api_error(request: Request, error: Exception) -> Response:
    """Return the error that a route raised, and add its code to the log."""
    assert isinstance(error, ApiError)
    notes(request.scope)["error"] = error.code or error.kind
    return error_response(error)


async def _routing_error(request: Request, error: Exception) -> Response:
    """Return the error for an unknown route or method, in the format of all errors."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:200]}: {error.detail}."
    return error_response(ApiError(error.status_code, message, code="unknown_url", headers=error.headers))


async def _disconnected(request: Request, error: Exception) -> Response:
    """Return the response that is logged for a client that has disconnected."""
    notes(request.scope)["error"] = "client_disconnected"
    return Response(status_code=CLOSED_BY_CLIENT)


async def _internal_error(request: Request, error: Exception) -> Response:
    """Return the response for a route that failed; `gate` prints the traceback on stderr."""
    return error_response(internal())
