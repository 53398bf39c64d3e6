"""Files that are whole or not there: written beside their place, flushed to the disk, then renamed into it."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to write files into. After the block they are flushed to the disk and the folder takes the
    name `path`, in place of what stood there; where the block fails, it is gone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~_umask())  # safetensors keeps its files to their owner
                _flush(file)
        _flush_folder(temporary)
        temporary.chmod(0o777 & ~_umask())
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _flush_folder(path.parent)


def write_folder(path: Path, files: Files) -> None:
    """Write a new folder of `files`; it appears under its name when all of them are on the disk."""
    with new_folder(path) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)


def write_files(folder: Path, files: Files) -> None:
    """Write `files` into a folder that may hold others; each is replaced as a whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        temporary = folder / f".{name}.{os.getpid()}.tmp"
        try:
            temporary.write_bytes(content)
            _flush(temporary)
            temporary.replace(folder / name)
        finally:
            temporary.unlink(missing_ok=True)
    _flush_folder(folder)


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
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
