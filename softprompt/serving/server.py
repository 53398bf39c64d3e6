"""Run the server: load the base, listen, and shut down when asked to."""

import asyncio
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import FrameType
from typing import TypeVar

import uvicorn

from softprompt.config.adapter_specs import NONE
from softprompt.generation.hf_generate import TransformersGenerator
from softprompt.generation.model import SoftPromptModel
from softprompt.serving.app import ROUTES, make_app
from softprompt.serving.args import API_KEY, ServeArguments, ServeConfig, parse_roots
from softprompt.serving.gate import Gate
from softprompt.serving.registry import base_of
from softprompt.serving.service import Service
from softprompt.utils.errors import ConfigError
from softprompt.utils.std_streams import tell

BACKLOG = 2048  # connections that wait to be accepted
Result = TypeVar("Result")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(config: ServeConfig) -> None:
    """Serve until SIGINT or SIGTERM: running answers are finished, new requests are refused with 503. A second signal
    ends the server at once.

    Raises:
        SoftpromptError: The adapters' folders or the base cannot be used, or the address is taken.
    """
    server, settings = config.server, config.model
    # The model thread and the event loop share Python's global interpreter lock. With its default switch interval,
    # either may wait 5 ms for each token.
    sys.setswitchinterval(5e-4)
    roots = parse_roots(server.adapters)
    base = settings.model_name_or_path or base_of(roots)
    with listen(server.host, server.port) as listening:  # before the base is loaded, which takes long
        model = in_own_thread(
            lambda: SoftPromptModel.from_pretrained(
                base,
                NONE,
                device=settings.device,
                bf16=settings.bf16,
                fp16=settings.fp16,
                load_in_8bit=settings.load_in_8bit,
                load_in_4bit=settings.load_in_4bit,
                engine=settings.engine,
            )
        )
        service = Service(model, roots, server)
        _announce(service, server, listening)
        asyncio.run(Server(service).serve_on(listening))


def in_own_thread(function: Callable[[], Result]) -> Result:
    """Call a function in a thread that ends afterwards, and return its result or raise its exception.

    Each thread that computes with torch on the CPU gets OpenMP threads of its own, which live as long as it does. If
    those of the main thread were left after loading the base, there would be more of them than cores. GNU OpenMP then
    lets waiting threads sleep at once, which makes the steps of the model's thread slower.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="loader", daemon=True).start()  # daemon, so that Ctrl-C need not wait for it
    return future.result()


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address.

    Raises:
        ConfigError: The address is taken or is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only for sockets whose protocol is named; with it, a token may wait for 40 ms.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":  # on Windows, the option would let two servers share a port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(BACKLOG)
    except (OSError, UnicodeError) as error:
        listening.close()
        raise ConfigError(f"--host {host} --port {port}: {getattr(error, 'strerror', None) or error}") from None
    return listening


class Server(uvicorn.Server):
    """A uvicorn server that keeps listening until the running answers are finished, so that new requests are answered
    with 503 until then."""

    def __init__(self, service: Service, log: Callable[[str], object] = lambda line: print(line, flush=True)):
        self.service, self.gate = service, Gate(make_app(service), service, ROUTES, log)
        config = uvicorn.Config(
            self.gate,
            interface="asgi3",
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            backlog=BACKLOG,
            timeout_graceful_shutdown=5,  # the answers are finished before uvicorn shuts down
        )
        super().__init__(config)
        self.loop: asyncio.AbstractEventLoop | None = None

    async def serve_on(self, listening: socket.socket) -> None:
        """Serve the connections of a socket until a signal comes, or `drain` is called."""
        self.loop = asyncio.get_running_loop()
        self.service.start()
        try:
            await self.serve(sockets=[listening])
        finally:
            await self.service.stop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to shut down; at a second signal, end at once."""
        if self.gate.draining:
            self.should_exit = self.force_exit = True
            return
        tell(f"{signal.Signals(sig).name}: finishing the running answers; a second signal ends the server at once")
        self.drain()

    def drain(self) -> None:
        """Refuse new requests, finish the running ones, and end. Any thread may call this."""
        assert self.loop is not None
        self.loop.call_soon_threadsafe(self.gate.drain, self._end)

    def _end(self) -> None:
        self.should_exit = True


def _announce(service: Service, arguments: ServeArguments, listening: socket.socket) -> None:
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    adapters = [served.name for served in service.registry.all()]
    names = f" and {len(adapters):,} adapters" if adapters else ""
    tell(f"serving {service.base_id}{names} at http://{shown}:{port}/v1; {arguments.batch_size} answers at a time")
    if isinstance(service.generator, TransformersGenerator):
        tell(
            "this base is served with transformers' batches, which is slower: a request waits for the end of the batch "
            "before it"
        )
    if arguments.host not in LOOPBACK and arguments.api_key is None:
        tell(f"warning: anyone who reaches {arguments.host} can use this server; set {API_KEY}")
    sys.stderr.flush()
