"""Servers of OpenAI's API and their clients, for `serve.py`. The clients ask at the same time, and note what they get
and when."""

import asyncio
import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import httpx

START_SECONDS, ANSWER_SECONDS = 600, 1800


class Question(NamedTuple):
    """A user's message to a model, which is answered with at most `tokens` tokens."""

    model: str
    text: str
    tokens: int


class Answer(NamedTuple):
    """An answer, and the seconds from its request to its first text and to its end."""

    text: str
    tokens: int
    first: float
    whole: float


class Load(NamedTuple):
    """The answers of all clients, client by client, and the seconds from the first request to the last answer."""

    answers: list[Answer]
    seconds: float

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return sum(answer.tokens for answer in self.answers) / self.seconds


def send(url: str, of_clients: Sequence[Sequence[Question]]) -> Load:
    """Let clients ask at the same time. Each has its own questions, and asks one when it has the answer to the last.

    Raises:
        ValueError: The server refuses a question, or fails to answer it.
    """

    async def client(http: httpx.AsyncClient, questions: Sequence[Question]) -> list[Answer]:
        return [await _ask(http, url, question) for question in questions]

    async def all_clients() -> Load:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=ANSWER_SECONDS, limits=limits, trust_env=False) as http:
            start = time.perf_counter()
            found = await asyncio.gather(*(client(http, questions) for questions in of_clients))
            return Load([answer for answers in found for answer in answers], time.perf_counter() - start)

    return asyncio.run(all_clients())


async def _ask(http: httpx.AsyncClient, url: str, question: Question) -> Answer:
    body = {"model": question.model, "messages": [{"role": "user", "content": question.text}], "temperature": 0}
    body |= {"max_tokens": question.tokens, "stream": True, "stream_options": {"include_usage": True}}
    start, first, text, tokens = time.perf_counter(), None, "", 0
    async with http.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise ValueError(f"status {response.status_code}: {(await response.aread()).decode()[:300]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk: dict[str, Any] = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise ValueError(f"error in the stream: {str(chunk['error'])[:300]}")
            text += (piece := "".join(choice["delta"].get("content") or "" for choice in chunk["choices"]))
            if piece and first is None:
                first = time.perf_counter() - start
            if usage := chunk.get("usage"):
                tokens = usage["completion_tokens"]
    whole = time.perf_counter() - start
    return Answer(text, tokens, whole if first is None else first, whole)


@contextmanager
def server(command: Sequence[str]) -> Iterator[str]:
    """Run a server on a free port until the block ends; yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, environment = f"http://127.0.0.1:{port}", {**os.environ, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as log:
        flags = ["--host", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen([*command, *flags], stdout=log, stderr=log, env=environment)
        try:
            end = time.monotonic() + START_SECONDS
            while not is_up(url):
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    told = log.read().decode(errors="replace")[-2000:]
                    raise SystemExit(f"{' '.join(command)} does not serve:\n{told}")
                time.sleep(0.1)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def is_up(url: str) -> bool:
    """Whether the server at `url` answers."""
    try:
        return httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
