"""The standard streams as they are found: closed, of an encoding that lacks a character, or with a reader that leaves
while there is still work to do."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO


class BestEffortStream:
    """A text stream for messages that only accompany the work. Once `stream` cannot be written to any more (a closed
    terminal, a pipe whose reader has gone, a full disk), what is written is dropped and nothing is raised."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def _try(self, method: str, *arguments: Any) -> None:
        try:
            getattr(self._stream, method)(*arguments)
        except (OSError, ValueError):  # ValueError: it has been closed
            self._stream = null_stream()

    def __getattr__(self, name: str) -> Any:  # isatty, fileno, encoding …
        return getattr(self._stream, name)


def null_stream() -> TextIO:
    """A stream that takes any text and drops it."""
    return open(os.devnull, "w", encoding="utf-8", errors="replace")


@contextmanager
def tolerant_streams() -> Iterator[None]:
    """Everything that is printed inside only accompanies the work: no character and no reader of stdout or stderr can
    end it."""
    with ExitStack() as stack:
        for stream in (sys.stdout, sys.stderr):
            stack.enter_context(_escaping(stream))
        stack.enter_context(redirect_stdout(BestEffortStream(sys.stdout)))
        stack.enter_context(redirect_stderr(BestEffortStream(sys.stderr)))
        yield


@contextmanager
def answers_on_stdout() -> Iterator[None]:
    """What is printed to stdout inside is the work itself: a reader that leaves ends it (BrokenPipeError)."""
    stdout = sys.stdout
    with tolerant_streams(), redirect_stdout(stdout):
        yield


def reopen_closed_streams() -> None:
    """Give streams that were closed before the process began (`>&-`, pythonw) a place to read from or write to."""
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115 (for the rest of the process)
    sys.stdout, sys.stderr = sys.stdout or null_stream(), sys.stderr or null_stream()


def discard_buffer(stream: Any) -> None:
    """Send what `stream` still holds nowhere: the interpreter flushes it once more at its end, and would fail again."""
    with suppress(OSError, ValueError), null_stream() as instead:  # it may have no file of the system
        os.dup2(instead.fileno(), stream.fileno())


def can_show(text: str) -> bool:
    """Whether stdout's encoding has every character of the text."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def _escaping(stream: Any) -> Iterator[None]:
    """A character that the stream's encoding lacks is shown as its escape, such as \\u6b63."""
    if stream is None or not hasattr(stream, "reconfigure"):
        yield
        return
    errors = stream.errors
    with suppress(OSError, ValueError):
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        with suppress(OSError, ValueError):
            stream.reconfigure(errors=errors)
