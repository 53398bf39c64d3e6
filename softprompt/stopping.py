"""The wish to stop: a signal, or a time limit. The loop asks between steps, so that what was done is saved."""

import contextlib
import os
import re
import signal
import sys
import threading
import time
from types import FrameType, TracebackType

from softprompt.errors import ConfigError

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}  # as shells report them
TIME_IS_UP = 124  # as timeout(1) has it
EXIT_CODES = (*CODES.values(), TIME_IS_UP)


def seconds_of(text: str) -> float:
    """`3h30m`, `45m`, `90s` or plain minutes → seconds.

    Raises:
        ConfigError: anything else, or no time at all.
    """
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text) if not text.isdecimal() else None
    hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0)
    total = 60 * int(text) if text.isdecimal() else 3600 * hours + 60 * minutes + seconds
    if total <= 0:
        raise ConfigError(f"--max_time {text!r} is no time such as 3h30m, 45m, 90s or a number of minutes")
    return float(total)


class StopRequest:
    """Inside `with`, the first SIGINT or SIGTERM is kept as a wish and the second stops at once. `max_time` (seconds)
    becomes a wish by itself. `exit_code` is None for as long as nothing asked to stop."""

    def __init__(self, max_time: float | None = None):
        self.ends = None if max_time is None else time.monotonic() + max_time
        self.signal: int | None = None
        self.usual: dict[int, object] = {}

    @property
    def exit_code(self) -> int | None:
        if self.signal is not None:
            return CODES[signal.Signals(self.signal)]
        return TIME_IS_UP if self.ends is not None and time.monotonic() >= self.ends else None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python lets no one handle signals
            self.usual = {number: signal.signal(number, self._asked) for number in CODES}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self.usual.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise SystemExit(CODES[signal.Signals(number)])
        self.signal = number
        with contextlib.suppress(OSError, AttributeError):  # not print, which may be the one that was interrupted
            os.write(sys.stderr.fileno(), b"\nstopping after this step; a second signal stops at once\n")
