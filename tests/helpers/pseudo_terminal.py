"""Run a program behind a pseudo-terminal, as if a user sat there: type keys, and wait for what is displayed."""

import codecs
import contextlib
import os
import pty
import select
import signal
import time
from collections.abc import Sequence


class PseudoTerminal:
    """A program in another process whose standard streams are a terminal.

    Attributes:
        shown: All that has been displayed so far.
    """

    def __init__(self, argv: Sequence[str], **variables: str):
        """Start a program with additional environment variables."""
        self._child, self._terminal = pty.fork()
        if self._child == 0:
            os.environ.update(variables)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored if the tests run in the background
            os.execv(argv[0], argv)
        self.shown, self._seen, self._decoder = "", 0, codecs.getincrementaldecoder("utf-8")("replace")

    def type(self, keys: str) -> None:
        """Type keys: "\\r" is Enter, "\\x1b" Esc, "\\x03" Ctrl-C and "\\x04" Ctrl-D."""
        os.write(self._terminal, keys.encode())

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """Wait until a text is displayed behind the one that was waited for last. Return what stands between them."""
        began, ends = self._seen, time.monotonic() + seconds
        while text not in self.shown[began:]:
            assert time.monotonic() < ends and self._read(ends), f"{text!r} was not displayed: {self.shown!r}"
        found = self.shown.index(text, began)
        self._seen = found + len(text)
        return self.shown[began:found]

    def exit_code(self, seconds: float = 60) -> int:
        """Wait until the program has ended, and return its exit code."""
        ends = time.monotonic() + seconds
        while self._read(ends):
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self._child, 0)[1])

    def __enter__(self) -> "PseudoTerminal":
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self._child, signal.SIGKILL)
            os.waitpid(self._child, 0)
        os.close(self._terminal)

    def _read(self, ends: float) -> bool:
        """Read what is displayed next. Return False if there is nothing more."""
        ready, _, _ = select.select([self._terminal], [], [], max(0, ends - time.monotonic()))
        try:
            text = os.read(self._terminal, 1 << 16) if ready else b""
        except OSError:  # the terminal is gone with the program
            return False
        self.shown += self._decoder.decode(text)
        return bool(text)
