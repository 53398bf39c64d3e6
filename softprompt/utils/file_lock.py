"""Locks between processes: at most one process writes to a run's output folder, or to a file of answers.

The lock itself is `filelock`'s (a dependency of huggingface_hub and torch). The operating system releases it when its
process ends, even by SIGKILL, so a lock file that a killed process left behind blocks nobody.
"""

import contextlib
import errno
import os
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from softprompt.utils.errors import OutputError

LOCK_FILE = ".softprompt.lock"
# `is_held` itself takes the lock for well under a millisecond. Taking and testing therefore retry for this long, so
# that a process that only tests the lock, such as a report, is not mistaken for a writer.
WAIT_SECONDS, RETRY_SECONDS = 1.0, 0.01
UNSUPPORTED = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}  # from some network file systems


class ProcessLock:
    """An exclusive lock on the file `path`, held from `take` to `release` or to the end of a `with` block.

    The file contains the holder's process id while the lock is held, and is removed on release. On a file system
    without locks, `take` always succeeds.
    """

    def __init__(self, path: Path, target: str, kind: str):
        """Prepare a lock; nothing is written before `take`.

        Args:
            path: The lock file.
            target: What the lock protects, as error messages name it, such as `--output_dir run`.
            kind: What the user may name instead: "folder" or "file".
        """
        self.path, self.target, self.kind = path, target, kind
        self._lock = _file_lock(path)
        self._stat: os.stat_result | None = None  # stat of the lock file while the lock is held

    def take(self) -> "ProcessLock":
        """Take the lock and return it.

        Raises:
            OutputError: Another process holds the lock.
            OSError: The lock file cannot be created, or it is a symbolic link.
        """
        if self.path.is_symlink():  # older versions of filelock would follow it and truncate its target
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(self.path))
        try:
            self._lock.acquire(timeout=WAIT_SECONDS, poll_interval=RETRY_SECONDS)
        except Timeout:
            raise self._refusal() from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            return self
        self.path.write_text(str(os.getpid()), encoding="ascii")
        self._stat = self.path.stat()
        return self

    def release(self) -> None:
        """Remove the lock file and release the lock; do nothing if it is not held."""
        if self._stat is None:
            return
        with contextlib.suppress(OSError):  # already removed, or in a folder that has become read-only
            if os.path.samestat(self._stat, self.path.stat()):  # else another process has put its own file there
                self.path.unlink()
        self._stat = None
        self._lock.release()

    def is_held(self) -> bool:
        """Return whether a process holds the lock. No file is created.

        A lock file that this user may not write to cannot be tested, and counts as not held.
        """
        if not self.path.is_file():
            return False
        lock = _file_lock(self.path)
        try:
            lock.acquire(timeout=WAIT_SECONDS, poll_interval=RETRY_SECONDS)
        except Timeout:
            return True
        except OSError:
            return False
        lock.release()
        return False

    def refuse_if_held(self) -> None:
        """Raise OutputError if a process holds the lock."""
        if self.is_held():
            raise self._refusal()

    def __enter__(self) -> "ProcessLock":
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def _refusal(self) -> OutputError:
        try:
            holder = self.path.read_text(encoding="ascii", errors="replace")[:20]
        except OSError:
            holder = ""
        return OutputError(
            f"{self.target}: process {holder or '(unknown)'} is writing there; wait until it has ended, "
            f"or name another {self.kind}"
        )


class FolderLock(ProcessLock):
    """The lock of an existing output folder; its lock file is `.softprompt.lock` in that folder."""

    def __init__(self, folder: Path):
        super().__init__(folder / LOCK_FILE, f"--output_dir {folder}", "folder")
        self.folder = folder


def _file_lock(path: Path) -> BaseFileLock:
    return FileLock(str(path), thread_local=False)  # any thread may release it
