"""Servers of this process on free ports, and their clients."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import openai

from softprompt.generation.model import SoftPromptModel
from softprompt.serving.args import parse_roots, serve_config
from softprompt.serving.server import Server, listen
from softprompt.serving.service import Service

SECONDS = 60  # after which a test that waits fails


class Running:
    """A server that runs in a thread of this process.

    Attributes:
        log: The lines that it has logged, parsed.
    """

    def __init__(self, service: Service, port: int, server: Server, thread: threading.Thread, log: list[str]):
        self.service, self.server, self.thread, self._log = service, server, thread, log
        self._http = httpx.Client(timeout=SECONDS, verify=False, trust_env=False)
        self.address, self.url = ("127.0.0.1", port), f"http://127.0.0.1:{port}"

    @property
    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._log]

    @property
    def model(self) -> SoftPromptModel:
        return self.service.model

    @cache  # noqa: B019 (a server lives as long as its test)
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=SECONDS, max_retries=0)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=SECONDS, max_retries=0)

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        return self._http.post(self.url + path, json=body, headers=headers)

    def post_content(self, path: str, content: Any, kind: str = "application/json") -> httpx.Response:
        return self._http.post(self.url + path, content=content, headers={"Content-Type": kind})

    def get(self, path: str, **headers: str) -> httpx.Response:
        return self._http.get(self.url + path, headers=headers)

    def metric(self, name: str) -> float:
        lines = self.get("/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"softprompt_{name} "))

    def ask(self, model: str, text: str, **settings: Any) -> str:
        """The content of one answer to one message."""
        messages = [{"role": "user", "content": text}]
        answer = self.client().chat.completions.create(model=model, messages=messages, **settings)
        return answer.choices[0].message.content


@contextmanager
def running_server(model: SoftPromptModel, *adapters: Path | str, **arguments: Any) -> Iterator[Running]:
    """Serve a loaded model with the folders `adapters`; `arguments` are flags."""
    config = serve_config(adapters=[str(each) for each in adapters], **arguments).server
    service, lines = Service(model, parse_roots(config.adapters), config), list[str]()
    server = Server(service, lines.append)
    with listen("127.0.0.1", 0) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)  # a client that does not read is felt soon
        thread = threading.Thread(target=lambda: asyncio.run(server.serve_on(listening)), name="server")
        thread.start()
        until(lambda: server.started)
        try:
            yield Running(service, listening.getsockname()[1], server, thread, lines)
        finally:
            if thread.is_alive():
                server.drain()
            thread.join(SECONDS)
            assert not thread.is_alive(), "the server did not end"


def until(condition: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """Wait for a condition; return its true value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
    return value


@contextmanager
def slow_steps(model: SoftPromptModel, seconds: float) -> Iterator[None]:
    """Let each step of continuous batching take at least so long."""
    steps = model.generator.model  # type: ignore[union-attr]
    forward = type(steps).forward

    def slow(*arguments: Any) -> Any:
        time.sleep(seconds)
        return forward(steps, *arguments)

    steps.forward = slow
    try:
        yield
    finally:
        del steps.forward
