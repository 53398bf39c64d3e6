"""Robust standard streams: they may be closed, have an encoding that lacks a character, or lose their reader while the
program is still working."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO

from softprompt.utils.translation import translate


class BestEffortStream:
    """A wrapper of a text stream that never raises.

    Once `stream` cannot be written to any more (a closed terminal, a pipe without a reader, a full disk), further
    output is dropped.
    """

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
        except (OSError, ValueError):  # ValueError: the stream is closed
            self._stream = null_stream()

    def __getattr__(self, name: str) -> Any:  # isatty, fileno, encoding …
        return getattr(self._stream, name)


def is_interactive() -> bool:
    """Return whether a person types statements into this process, in Python's own prompt, IPython or Jupyter."""
    return hasattr(sys, "ps1")


def null_stream() -> TextIO:
    """Open a stream that accepts any text and drops it."""
    return open(os.devnull, "w", encoding="utf-8", errors="replace")


def tell(text: str) -> None:
    """Print a message on stderr, so that stdout holds only answers."""
    print(translate(text), file=sys.stderr)


@contextmanager
def tolerant_streams() -> Iterator[None]:
    """Treat all output as optional: inside the block, a print to stdout or stderr never fails because of a character or
    a closed pipe. Both streams are buffered by lines, even if they are files or pipes."""
    with ExitStack() as stack:
        for stream in (sys.stdout, sys.stderr):
            stack.enter_context(_configured(stream))
        stack.enter_context(redirect_stdout(BestEffortStream(sys.stdout)))
        stack.enter_context(redirect_stderr(BestEffortStream(sys.stderr)))
        yield


@contextmanager
def answers_on_stdout() -> Iterator[None]:
    """Treat stdout as the program's result: inside the block, printing to a pipe without a reader raises
    BrokenPipeError. stderr is treated as by `tolerant_streams`."""
    stdout = sys.stdout
    with tolerant_streams(), redirect_stdout(stdout):
        yield


def reopen_closed_streams() -> None:
    """Replace standard streams that were closed before the process began (`>&-`, pythonw) by the null device."""
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115 (open until the process ends)
    sys.stdout, sys.stderr = sys.stdout or null_stream(), sys.stderr or null_stream()


def discard_buffer(stream: Any) -> None:
    """Redirect what `stream` has buffered to the null device, since the interpreter would fail to flush it at exit."""
    with suppress(OSError, ValueError), null_stream() as instead:  # the stream may have no file descriptor
        os.dup2(instead.fileno(), stream.fileno())


def can_show(text: str) -> bool:
    """Return whether stdout's encoding has every character of `text`."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def _configured(stream: Any) -> Iterator[None]:
    """Inside the block, buffer the stream by lines, and write characters that its encoding lacks as escapes, such as
    \\u6b63."""
    if stream is None or not hasattr(stream, "reconfigure"):
        yield
        return
    before = {"errors": stream.errors, "line_buffering": stream.line_buffering}
    with suppress(OSError, ValueError):
        stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        yield
    finally:
        with suppress(OSError, ValueError):
            stream.reconfigure(**before)
