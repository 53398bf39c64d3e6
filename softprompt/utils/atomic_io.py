"""Atomic writes: a file or folder appears under its name only when it is complete and on the disk.

Content is written under a temporary name in the same folder, flushed to the disk, then renamed. The readers are for
untrusted folders: they do not follow a link that leads out of the folder.
"""

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from softprompt.utils.errors import OutputError

Files = Mapping[str, bytes | Sequence[Any]]  # name → content, or buffers that make it up
# Suffixes of hidden temporary folders that are being written, replaced but not yet removed, or about to be removed.
NEW, OLD, GONE = "new", "old", "gone"


def check_writable(path: Path, flag: str) -> None:
    """Check that the folder `path` can be created or written to, without creating it.

    Args:
        path: The output folder.
        flag: The flag that named it, for the error message.

    Raises:
        OutputError: The path, or its nearest existing parent, is not a folder or cannot be written to.
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


def cache_dir(kind: str) -> Path:
    """Return $XDG_CACHE_HOME/softprompt/KIND, by default ~/.cache/softprompt/KIND; see `_user_dir`."""
    return _user_dir("XDG_CACHE_HOME", "~/.cache") / kind


def state_dir() -> Path:
    """Return $XDG_STATE_HOME/softprompt, by default ~/.local/state/softprompt; see `_user_dir`. Unlike a cache, it
    holds files that cannot be made again, such as the history of chats."""
    return _user_dir("XDG_STATE_HOME", "~/.local/state")


def _user_dir(variable: str, default: str) -> Path:
    """Return this package's folder in the folder that an environment variable names.

    A relative path is ignored, as the XDG Base Directory Specification requires. For a user without a home folder, the
    result is a path below the null device, where nothing can be created.
    """
    named = os.environ.get(variable, "")
    place = Path(named if os.path.isabs(named) else os.path.expanduser(default))
    if not place.is_absolute():
        place = Path(os.devnull)
    return place / "softprompt"


def read_inside(folder: Path, name: str, limit: int) -> bytes:
    """Return the content of the file `name` in `folder`, opened as by `open_inside`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is larger than `limit` bytes, not a regular file, or a link that leads out of the folder.
    """
    with open_inside(folder, name) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"larger than {limit:,} bytes")
        return file.read(size + 1)


def open_inside(folder: Path, name: str) -> BinaryIO:
    """Open the regular file `name` in `folder` for reading.

    A symbolic link is followed only within the folder. In a snapshot of the hub's cache, where all files are links, it
    may also lead to the cache's blobs.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a regular file, or a link that leads out of the folder.
    """
    path, home = Path(os.path.realpath(folder / name, strict=True)), folder.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(path.is_relative_to(place) for place in homes):
        raise ValueError("a link that leads out of the folder")
    if not path.is_file():
        raise ValueError("not a plain file")
    return open(path, "rb")


@contextmanager
def new_folder(path: Path, replace: bool = True) -> Iterator[Path]:
    """Write a folder atomically: yield a temporary folder beside `path`, and rename it to `path` after the block.

    Its files are flushed to the disk first. If the block or the renaming fails, the temporary folder is removed, and
    what existed at `path` stays.

    Args:
        path: The folder to write.
        replace: Whether to replace what exists at `path`.

    Raises:
        FileExistsError: Something exists at `path` at the end of the block, and `replace` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(f".{NEW}", f".{path.name}-", path.parent))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~_umask())  # safetensors lets only the owner read its files
                _flush(file)
        _flush_folder(temporary)
        temporary.chmod(0o777 & ~_umask())
        if os.path.lexists(path) and not replace:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        _rename_over(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_folder(path: Path) -> None:
    """Remove a folder; rename it first, so that an incomplete folder is never seen under its name.

    If `path` is a symbolic link to a folder, only the link is removed.
    """
    shutil.rmtree(_set_aside(path, GONE))


def remove_leftovers(folder: Path, folders: str, files: Iterable[str] = ()) -> None:
    """Clean up temporary files of processes that were killed while they wrote into `folder`.

    A folder that `new_folder` had moved aside, and that nothing has replaced, is moved back.

    Args:
        folder: Where to look for temporary files.
        folders: A regular expression for names that were given to `new_folder` or `remove_folder`.
        files: Names that were given to `write_files`.
    """
    for path in folder.glob(".*"):
        if found := re.fullmatch(rf"\.({folders})-[a-z0-9_]{{8}}\.({NEW}|{OLD}|{GONE})", path.name):
            with contextlib.suppress(OSError):  # a folder that cannot be moved back stays where it is
                if found[2] == OLD and (path / found[1]).exists():
                    _put_back(path, folder / found[1])
                shutil.rmtree(path)
        elif (found := re.fullmatch(r"\.(.+)\.\d+\.tmp", path.name)) and found[1] in files:
            path.unlink(missing_ok=True)


def write_folder(path: Path, files: Files) -> None:
    """Write a folder of `files` atomically; an existing one is replaced once all files are on the disk."""
    with new_folder(path) as folder:
        for name, content in files.items():
            _write_and_flush(folder / name, content)


def write_files(folder: Path, files: Files) -> None:
    """Write `files` into an existing folder, which may contain others; each file is replaced atomically."""
    for name, content in files.items():
        temporary = folder / f".{name}.{os.getpid()}.tmp"
        try:
            _write_and_flush(temporary, content)
            temporary.replace(folder / name)
        finally:
            temporary.unlink(missing_ok=True)
    _flush_folder(folder)


def _rename_over(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`; if that fails, what existed at `path` gets its name back."""
    aside = _set_aside(path, OLD) if os.path.lexists(path) else None
    try:
        temporary.rename(path)
    except BaseException:
        if aside:
            _put_back(aside, path)
            aside.rmdir()
        raise
    _flush_folder(path.parent)
    if aside:  # remove_leftovers removes what cannot be removed now
        shutil.rmtree(aside, ignore_errors=True)


def _set_aside(path: Path, kind: str) -> Path:
    """Move a folder, or a link to one, into a new hidden folder beside it, and return the hidden folder."""
    aside = Path(tempfile.mkdtemp(f".{kind}", f".{path.name}-", path.parent))
    try:
        path.rename(aside / path.name)
    except BaseException:
        aside.rmdir()
        raise
    return aside


def _put_back(aside: Path, path: Path) -> None:
    """Move back what `_set_aside` moved, unless something else has the name by now."""
    if not os.path.lexists(path):
        (aside / path.name).rename(path)


def _write_and_flush(path: Path, content: bytes | Sequence[Any]) -> None:
    with open(path, "wb") as file:
        file.writelines([content] if isinstance(content, bytes) else content)
    _flush(path)


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    if os.name == "posix":  # on Windows a folder cannot be opened
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
