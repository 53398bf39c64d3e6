"""The messages of earlier chats, in a file that only its user can read."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from softprompt.utils.atomic_io import state_dir
from softprompt.utils.redact import redacted

OFF = "SOFTPROMPT_NO_HISTORY"  # environment variable; if it is not empty, no history is read or written
MAX_ENTRIES = 1_000
MAX_BYTES = 1 << 20  # when a larger file is read, it is cut to its last entries
ONLY_OWNER = 0o600


class HistoryFile:
    """The messages that were typed in chats, the oldest first, one JSON text per line.

    A file that cannot be read or written is treated as empty, so that a chat works in a home folder that is read-only
    or missing. Secrets are redacted before they are written.

    Args:
        path: The file; None keeps no history.
    """

    def __init__(self, path: Path | None):
        self.path = path

    @classmethod
    def of_user(cls) -> "HistoryFile":
        """Return the history of the user who runs this process, `chat_history` in `state_dir()`; none if the
        environment variable SOFTPROMPT_NO_HISTORY is set."""
        return cls(None if os.environ.get(OFF) else state_dir() / "chat_history")

    def load(self) -> list[str]:
        """Return the newest messages, at most MAX_ENTRIES."""
        content = self._read()
        lines = content[-MAX_BYTES:].decode("utf-8", errors="replace").split("\n")
        entries = [entry for line in lines if (entry := _parsed(line))][-MAX_ENTRIES:]
        if len(content) > MAX_BYTES:
            self._write(entries, os.O_TRUNC)
        return entries

    def append(self, message: str) -> None:
        """Add a message."""
        self._write([redacted(message)], os.O_APPEND)

    def _read(self) -> bytes:
        with suppress(OSError):
            if self.path is not None and self.path.is_file() and not self.path.is_symlink():
                return self.path.read_bytes()
        return b""

    def _write(self, entries: Sequence[str], mode: int) -> None:
        """Write entries in one call, so that two chats at a time do not mix their lines."""
        if self.path is None:
            return
        content = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if self.path.is_symlink() or (self.path.exists() and not self.path.is_file()):
                return  # not a file of this program
            flags = os.O_WRONLY | os.O_CREAT | mode | getattr(os, "O_NOFOLLOW", 0)
            with os.fdopen(os.open(self.path, flags, ONLY_OWNER), "wb") as file:
                file.write(content.encode("utf-8", errors="replace"))


def _parsed(line: str) -> str:
    """Return the message of a line; an empty text if the line is damaged."""
    try:
        entry = json.loads(line) if line.strip() else ""
    except (ValueError, RecursionError):
        return ""
    return entry if isinstance(entry, str) else ""
