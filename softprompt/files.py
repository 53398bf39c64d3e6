"""Files that are whole or not there: written beside their place, flushed to the disk, then renamed into it."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from softprompt.errors import OutputError

Files = Mapping[str, bytes]  # name → content


def check_writable(path: Path, flag: str) -> None:
    """See that a folder `path` can be made or written into, without making it.

    Raises:
        OutputError: it, or the nearest folder above it that exists, is a file or takes no files.
    """
    nearest = path.absolute()
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if not nearest.is_dir():
        raise OutputError(f"{flag} {path}: {nearest} is not a folder; name a folder")
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise OutputError(
            f"{flag} {path}: {nearest} cannot be written to ({error.strerror}); name another folder"
        ) from None


def write_folder(path: Path, files: Files) -> None:
    """Write a new folder of `files`; it appears under its name when all of them are on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        for name, content in files.items():
            _write_and_flush(temporary / name, content)
        _flush_folder(temporary)
        temporary.chmod(0o777 & ~_umask())
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _flush_folder(path.parent)


def write_files(folder: Path, files: Files) -> None:
    """Write `files` into a folder that may hold others; each is replaced as a whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        temporary = folder / f".{name}.{os.getpid()}.tmp"
        try:
            _write_and_flush(temporary, content)
            temporary.replace(folder / name)
        finally:
            temporary.unlink(missing_ok=True)
    _flush_folder(folder)


def _write_and_flush(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
