"""Files that are whole or not there: written beside their place, flushed to the disk, then renamed into it."""

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
NEW, OLD, GONE = "new", "old", "gone"  # hidden folders end in what is in them: written, set aside, to be removed


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


def cache_dir(kind: str) -> Path:
    """$XDG_CACHE_HOME/softprompt/KIND, by default under ~/.cache; a relative one is ignored, as the XDG text asks."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    place = Path(named if os.path.isabs(named) else os.path.expanduser("~/.cache"))
    if not place.is_absolute():  # a user without a home: nothing can be kept below what is no folder
        place = Path(os.devnull)
    return place / "softprompt" / kind


def read_inside(folder: Path, name: str, limit: int) -> bytes:
    """The content of a file, as of `open_inside`, of a folder that may come from elsewhere.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a link that leads out, no plain file, or more than `limit` bytes.
    """
    with open_inside(folder, name) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"larger than {limit:,} bytes")
        return file.read(size + 1)


def open_inside(folder: Path, name: str) -> BinaryIO:
    """A plain file of a folder, to be read. A link is followed only within the folder, and within the cache of the hub,
    whose snapshots are links to its blobs.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a link that leads out, or no plain file.
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
    """A folder beside `path` to write files into. After the block they are flushed to the disk and the folder takes the
    name `path`, in place of what stood there; where the block or the renaming fails, it is gone and all is as before.

    Raises:
        FileExistsError: something stands at `path`, and it is not to be replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(f".{NEW}", f".{path.name}-", path.parent))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~_umask())  # safetensors keeps its files to their owner
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
    """Take a folder away, first from under its name: what is there by its name is whole at any time. Of a link to a
    folder, the link alone goes."""
    shutil.rmtree(_set_aside(path, GONE))


def remove_leftovers(folder: Path, folders: str, files: Iterable[str] = ()) -> None:
    """Tidy up after processes that were killed in `new_folder` (for names that match the pattern `folders`) and in
    `write_files` (of `files`). A folder that was set aside, and whose place nothing took, gets its name back."""
    for path in folder.glob(".*"):
        if found := re.fullmatch(rf"\.({folders})-[a-z0-9_]{{8}}\.({NEW}|{OLD}|{GONE})", path.name):
            with contextlib.suppress(OSError):  # what cannot be put back stays where it is
                if found[2] == OLD and (path / found[1]).exists():
                    _put_back(path, folder / found[1])
                shutil.rmtree(path)
        elif (found := re.fullmatch(r"\.(.+)\.\d+\.tmp", path.name)) and found[1] in files:
            path.unlink(missing_ok=True)


def write_folder(path: Path, files: Files) -> None:
    """Write a new folder of `files`; it appears under its name when all of them are on the disk, and one that it
    replaces goes only then."""
    with new_folder(path) as folder:
        for name, content in files.items():
            _write_and_flush(folder / name, content)


def write_files(folder: Path, files: Files) -> None:
    """Write `files` into a folder that is there and may hold others; each is replaced as a whole."""
    for name, content in files.items():
        temporary = folder / f".{name}.{os.getpid()}.tmp"
        try:
            _write_and_flush(temporary, content)
            temporary.replace(folder / name)
        finally:
            temporary.unlink(missing_ok=True)
    _flush_folder(folder)


def _rename_over(temporary: Path, path: Path) -> None:
    """Give `temporary` the name `path`. What had that name before gets it back where this fails."""
    aside = _set_aside(path, OLD) if os.path.lexists(path) else None
    try:
        temporary.rename(path)
    except BaseException:
        if aside:
            _put_back(aside, path)
            aside.rmdir()
        raise
    _flush_folder(path.parent)
    if aside:  # the new one is safe; what cannot be removed of this one is left to remove_leftovers
        shutil.rmtree(aside, ignore_errors=True)


def _set_aside(path: Path, kind: str) -> Path:
    """Move a folder, or a link to one, into a new hidden folder beside it, which is returned."""
    aside = Path(tempfile.mkdtemp(f".{kind}", f".{path.name}-", path.parent))
    try:
        path.rename(aside / path.name)
    except BaseException:
        aside.rmdir()
        raise
    return aside


def _put_back(aside: Path, path: Path) -> None:
    """Give what `_set_aside` moved its name back, unless that is taken."""
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
