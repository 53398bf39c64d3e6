"""The page at /: its files, and security headers that let it load from and connect to this server only."""

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse
from starlette.responses import Response

STATIC = Path(__file__).parent / "static"
FILES = {"/": "index.html", **{f"/{name}": name for name in ("page.css", "page.js", "zh.js", "icon.svg")}}
POLICY = "default-src 'none'; " + "; ".join(
    [
        *(f"{kind}-src 'self'" for kind in ("script", "style", "img", "connect")),
        *(f"{use} 'none'" for use in ("base-uri", "form-action", "frame-ancestors")),
    ]
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # a browser shows the page of a newer server at once
}


def add_page(app: FastAPI) -> None:
    """Add the routes of the page's files; they are the same for everybody, so they need no key."""
    for path, name in FILES.items():
        app.add_api_route(path, _answer(STATIC / name), methods=["GET", "HEAD"])


def _answer(file: Path) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        return FileResponse(file, headers=HEADERS)

    return answer
