"""Errors of a request, in the format of OpenAI's API: `{"error": {"message", "type", "param", "code"}}`."""

from collections.abc import Mapping
from typing import Any

INVALID, NOT_FOUND, OVERLOADED, SERVER = "invalid_request_error", "not_found_error", "rate_limit_error", "server_error"


class ApiError(Exception):
    """An error that is reported to the client.

    Attributes:
        status: The HTTP status code.
        kind: The field `type`.
        param: The field of the body that is wrong; None if no single field is.
        code: A word that identifies the error.
        headers: Headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.kind, self.param, self.code, self.headers = status, kind, param, code, dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the body of the response."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def invalid(param: str, why: str) -> ApiError:
    """Return the error for a field with a wrong value."""
    return ApiError(400, f"Invalid value for '{param}': {why}.", param=param, code="invalid_value")


def overloaded(message: str) -> ApiError:
    """Return the error of a server whose queue is full."""
    return ApiError(429, message, OVERLOADED, code="rate_limit_exceeded", headers={"Retry-After": "1"})


def unavailable(message: str) -> ApiError:
    """Return the error of a server that is shutting down."""
    return ApiError(503, message, SERVER, code="service_unavailable", headers={"Retry-After": "10"})


def timed_out(seconds: float) -> ApiError:
    """Return the error for a request that took longer than `seconds`."""
    message = f"The answer took longer than {seconds:g} seconds. Ask for fewer tokens."
    return ApiError(504, message, SERVER, code="timeout")


def internal() -> ApiError:
    """Return the error for a fault in the server; the details are only on the server's stderr."""
    message = "The server failed to answer this request; its output says why."
    return ApiError(500, message, SERVER, code="internal_error")
