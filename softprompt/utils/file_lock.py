"""One process to an output_dir. The lock is the kernel's (flock) on a file in the folder: it ends with its process, so
that kill -9 leaves nothing that stands in the way."""

import contextlib
import errno
import os
import time
from pathlib import Path

from softprompt.utils.errors import OutputError

LOCK_FILE = ".softprompt.utils.file_lock"
LOOKING_SECONDS, PAUSE = 5.0, 0.01  # a look takes far less than the first
NO_LOCKS_HERE = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}  # some network file systems


class FolderLock:
    """The lock of a folder that is there, held from `take` to `release`, at the latest to the end of `with`. Its file
    holds the process's id. `refuse_locked` takes the same lock shared for a moment, which is waited out."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / LOCK_FILE
        self.descriptor: int | None = None

    def take(self) -> "FolderLock":
        """Raises OutputError where another process holds it."""
        give_up = time.monotonic() + LOOKING_SECONDS
        while self.descriptor is None:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
            try:
                if flock(descriptor):
                    if _is_file_at(descriptor, self.path):  # its last holder may just have removed it
                        self.descriptor = descriptor
                elif not flock(descriptor, shared=True) or time.monotonic() > give_up:
                    raise _held(self.folder)
            finally:
                if self.descriptor is None:
                    os.close(descriptor)
            if self.descriptor is None:
                time.sleep(PAUSE)
        os.ftruncate(self.descriptor, 0)
        os.write(self.descriptor, str(os.getpid()).encode())
        return self

    def release(self) -> None:
        if self.descriptor is not None:
            if _is_file_at(self.descriptor, self.path):
                with contextlib.suppress(OSError):  # a folder that became read-only
                    self.path.unlink()
            os.close(self.descriptor)
            self.descriptor = None

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def refuse_locked(folder: Path) -> None:
    """Raises OutputError where a process holds the folder's lock; writes nothing."""
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDONLY)
    except OSError:  # no folder, or no run in it
        return
    try:
        if not flock(descriptor, shared=True):  # ranks may look at the same time
            raise _held(folder)
    finally:
        os.close(descriptor)


def flock(descriptor: int, shared: bool = False) -> bool:
    """Whether the file is ours now, or that of several who share it. Where there are no such locks, everything is."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS_HERE:
            raise
    return True


def _is_file_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def _held(folder: Path) -> OutputError:
    try:
        holder = (folder / LOCK_FILE).read_text(encoding="ascii", errors="replace")[:20]
    except OSError:
        holder = ""
    return OutputError(
        f"--output_dir {folder}: process {holder or '(unknown)'} is writing a run there; wait for its end, or name "
        "another folder"
    )
