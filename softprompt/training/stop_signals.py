"""Stop a run by a signal or a time limit. The loop checks for a request between steps, and saves before it stops."""

import contextlib
import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType

from softprompt.utils.errors import SIGNAL_EXIT_CODES, TIMEOUT_EXIT_CODE
from softprompt.utils.progress import in_notebook, log_stream
from softprompt.utils.std_streams import is_interactive


class StopRequest:
    """A context manager that turns the first SIGINT or SIGTERM into a request to stop. A second signal stops at once:
    it raises KeyboardInterrupt in an interactive session, so that the session continues, and SystemExit elsewhere.

    `exit_code` is None until a signal has arrived or `max_time` seconds have passed since `began`, a value of
    `time.monotonic()` (default: the creation of this object).
    """

    def __init__(self, max_time: float | None = None, began: float | None = None):
        self.ends = None if max_time is None else (time.monotonic() if began is None else began) + max_time
        self.signal: int | None = None
        self.usual: dict[int, object] = {}

    @property
    def exit_code(self) -> int | None:
        """The exit code to stop with; None to continue."""
        if self.signal is not None:
            return SIGNAL_EXIT_CODES[signal.Signals(self.signal)]
        return TIMEOUT_EXIT_CODE if self.ends is not None and time.monotonic() >= self.ends else None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # signal handlers can only be set there
            self.usual = {number: signal.signal(number, self._asked) for number in SIGNAL_EXIT_CODES}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self.usual.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            if is_interactive():
                raise KeyboardInterrupt
            raise SystemExit(SIGNAL_EXIT_CODES[signal.Signals(number)])
        self.signal = number
        told = "stopping after this step; a second signal stops at once"
        if in_notebook():  # the streams of a notebook have no file descriptor of their own
            print(told, file=log_stream())
            return
        with contextlib.suppress(OSError, AttributeError):  # the signal may have interrupted print
            os.write(sys.stderr.fileno(), f"\n{told}\n".encode())
