"""The adapters that a server serves: the folders that hold them, and their newest files.

Each value of --adapters names an adapter folder, a run, or a folder of these. For a run, the adapter that was written
last is served: its newest checkpoint while it trains, its final prompt once it has ended. A folder that a link leads to
is served only if it is inside the folder of --adapters.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from softprompt.config.schema import is_text
from softprompt.generation.adapters import LoadedAdapter, base_identity, check_adapter
from softprompt.prompt.file_names import CONFIG_FILE, SETTINGS_FILE, WEIGHTS_FILE
from softprompt.runs.checkpoints import checkpoints
from softprompt.serving.args import Root
from softprompt.utils.errors import AdapterError, SoftpromptError

INTERVAL = 1.0  # seconds; the folders are not read again sooner than this
# For this many seconds after its files were found last, an adapter is served, because a writer may be replacing them.
# This is longer than INTERVAL, so that the folders are read at least once more.
GRACE = 2 * INTERVAL
READINGS = 3  # of an adapter whose files are replaced while they are read
Files = tuple[str, tuple[tuple[int, int, int] | None, ...]]  # a name with a folder, and the versions of its files


class Source(NamedTuple):
    """An adapter folder or the folder of a run. It must be inside of `root`, a folder of --adapters. `named` says
    whether the command line or a request names the folder itself, and not only one that contains it."""

    name: str
    folder: Path
    root: Path
    named: bool


class Served(NamedTuple):
    """An adapter that is served, with its name and the time at which it was written (seconds since 1970)."""

    name: str
    adapter: LoadedAdapter
    created: int


def base_of(roots: Sequence[Root]) -> str:
    """Return the name or path of the base that the newest of the adapters names.

    Raises:
        AdapterError: There is no adapter, or it names no base.
    """
    folders = [folder for root in roots for source in _sources(root) for folder in _newest(source)]
    folder = max(folders, default=None, key=lambda folder: _version(folder / WEIGHTS_FILE) or (0,))
    if folder is None:
        raise AdapterError("--adapters: there is no adapter in these folders; give --model_name_or_path, or train one")
    base = LoadedAdapter.from_folder(folder).base
    if base is None:
        raise AdapterError(f"adapter {folder}: names no base; give --model_name_or_path")
    return base


class Registry:
    """The adapters that fit a base, by name.

    Args:
        roots: The folders of --adapters.
        base: Name or path of the base.
        hidden_size: H of the base.
        bits: The number of bits to which a flag quantized the base; see `check_adapter`.
        reserved: The name of the base in requests, which no adapter may have.
        tell: Called with a line about each folder that cannot be served.
    """

    def __init__(
        self,
        roots: Sequence[Root],
        base: str,
        hidden_size: int,
        bits: int | None,
        reserved: str,
        tell: Callable[[str], object],
    ):
        self._roots, self._base, self._hidden_size, self._bits = roots, base, hidden_size, bits
        self._reserved, self._tell = reserved, tell
        self._added: dict[str, Source] = {}
        self._served: dict[str, Served] = {}
        self._loaded: dict[Files, Served | None] = {}  # None: cannot be served
        self._found: dict[str, float] = {}  # when each served adapter was found last
        self._lock, self._read = threading.Lock(), -INTERVAL

    def get(self, name: str) -> Served | None:
        """Return the adapter of this name; None if there is none. It is read again if its files have changed."""
        self._refresh()
        return self._served.get(name)

    def all(self) -> list[Served]:
        """Return all adapters, in the order of the folders."""
        self._refresh()
        return list(self._served.values())

    def add(self, name: str, folder: str) -> Served:
        """Serve the adapter in a folder, given relative to one of --adapters, under the name `name`.

        Raises:
            ValueError: The name is taken, there is no such folder there, or it holds no adapter that fits the base.
        """
        if name == self._reserved or name in self._served:
            raise ValueError("the name is taken")
        if os.path.isabs(folder) or ".." in Path(folder).parts:
            raise ValueError("the folder must be relative to one of --adapters and must not leave it")
        for root in self._roots:
            source = Source(name, root.folder / folder, root.folder, False)
            if _holds_adapter(source):
                self._added[name] = source
                self._refresh(at_once=True)
                if name in self._served:
                    return self._served[name]
                del self._added[name]
        raise ValueError("no folder of --adapters holds an adapter there that fits the base")

    def _refresh(self, at_once: bool = False) -> None:
        """Look for new, changed and removed folders, at most every `INTERVAL` seconds."""
        with self._lock:
            if not at_once and time.monotonic() - self._read < INTERVAL:
                return
            served = self._look()
            self._read = time.monotonic()
            self._found.update(dict.fromkeys(served, self._read))
            missing = {name: kept for name, kept in self._served.items() if name not in served}
            served |= {name: kept for name, kept in missing.items() if self._read - self._found[name] < GRACE}
            self._served = served

    def _look(self) -> dict[str, Served]:
        """Return the adapters that the folders hold now; read those that are new or have changed."""
        served: dict[str, Served] = {}
        loaded: dict[Files, Served | None] = {}
        for source in [*(source for root in self._roots for source in _sources(root)), *self._added.values()]:
            if source.name in (*served, self._reserved) or not is_text(source.name):
                continue
            found = self._find(source, loaded)
            if found:
                served[source.name] = found
        self._loaded = loaded
        return served

    def _find(self, source: Source, loaded: dict[Files, Served | None]) -> Served | None:
        """Return the newest adapter of a source that can be served, and add all that were read to `loaded`. Files that
        are replaced while they are read may not belong together and are read again, up to `READINGS` times."""
        for _ in range(READINGS):
            for folder in _newest(source):
                files = _files(source.name, folder)
                found = self._loaded[files] if files in self._loaded else self._load(source, folder, files)
                if _files(source.name, folder) != files:
                    break
                loaded[files] = found
                if found:
                    return found
            else:
                return None
        return None

    def _load(self, source: Source, folder: Path, files: Files) -> Served | None:
        """Load an adapter. If it cannot be served, return None, and call `tell` with the reason unless the files have
        been replaced meanwhile."""
        try:
            adapter = LoadedAdapter.from_folder(folder)
            if not source.named and adapter.base and base_identity(adapter.base) != base_identity(self._base):
                raise AdapterError(f"it is for another base, {adapter.base}")
            check_adapter(source.name, adapter, self._hidden_size, self._base, self._bits)
            return Served(source.name, adapter, (_version(folder / WEIGHTS_FILE) or (0,))[0] // 10**9)
        except (SoftpromptError, OSError) as error:
            if _files(source.name, folder) == files:
                self._tell(f"adapter {folder} is not served: {error}")
            return None


def _sources(root: Root) -> Iterator[Source]:
    """Yield the adapter folders and runs of a value of --adapters."""
    if root.name or _is_source(root.folder):
        yield Source(root.name or root.folder.resolve().name, root.folder, root.folder, True)
        return
    try:
        children = sorted(root.folder.iterdir())
    except OSError:  # it has been removed, or may not be read
        return
    for child in children:
        if not child.name.startswith(".") and child.is_dir():
            yield Source(child.name, child, root.folder, False)


def _is_source(folder: Path) -> bool:
    """Whether a folder is an adapter folder or a run, rather than a folder of them."""
    return (folder / WEIGHTS_FILE).is_file() or bool(checkpoints(folder))


def _newest(source: Source) -> Iterator[Path]:
    """Yield the adapter folders of a source, the one that was written last first."""
    home = source.root.resolve()
    folders = [source.folder, *reversed(checkpoints(source.folder))]
    found = [(version, folder) for folder in folders if (version := _version(folder / WEIGHTS_FILE)) is not None]
    for _, folder in sorted(found, key=lambda each: each[0], reverse=True):
        if folder.resolve().is_relative_to(home):
            yield folder


def _holds_adapter(source: Source) -> bool:
    """Whether there is an adapter in the folder of a source; False for a path that cannot be looked up."""
    try:
        return next(_newest(source), None) is not None
    except OSError:  # such as a name that is too long
        return False


def _files(name: str, folder: Path) -> Files:
    """Return a key that changes when the adapter in a folder is replaced."""
    versions = tuple(_version(folder / file) for file in (WEIGHTS_FILE, CONFIG_FILE, SETTINGS_FILE))
    return f"{name}\0{folder}", versions


def _version(file: Path) -> tuple[int, int, int] | None:
    """Return the modification time in ns, the size and the inode of a file; None if it does not exist."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
