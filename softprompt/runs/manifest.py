"""A manifest in a run's folder lists the files that runs wrote there. Only listed files, the folder's own
files, are ever replaced or removed; any other file was written by something else."""

import errno
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from softprompt.runs.own_files import MANIFEST_FILE, PATTERN, beside, of_an_older_version
from softprompt.utils.atomic_io import Files, read_inside, remove_folder, write_files
from softprompt.utils.errors import OutputError

MAX_BYTES = 1 << 20
MARK = "softprompt run of train.py"  # by which a manifest is recognized
NAMED = 3  # the most files that a message names


@dataclass(frozen=True)
class Manifest:
    """The manifest of `folder`. It is read from disk on every call, and written only by the holder of the folder's
    lock. Names are relative to the folder, with / as separator."""

    folder: Path

    def names(self) -> set[str]:
        """Return the names of the folder's own files, as far as they exist."""
        listed = self._listed()
        found = of_an_older_version(self.folder) if listed is None else listed | beside(self.folder)
        return {name for name in found if self._stands(name)}

    def foreign(self, names: Iterable[str]) -> list[str]:
        """Return those of `names` that exist and are not the folder's own. The manifest's file name is checked, too."""
        owned = self.names()
        not_ours = [MANIFEST_FILE] if self._listed() is None else []
        return [name for name in [*names, *not_ours] if name not in owned and self._stands(name)]

    def refuse(self, foreign: Iterable[str]) -> None:
        """Raise OutputError if there are `foreign` files."""
        if some := sorted(foreign):
            told = ", ".join(some[:NAMED]) + (f" and {len(some) - NAMED} more" if len(some) > NAMED else "")
            them = "it" if len(some) == 1 else "them"
            raise OutputError(
                f"--output_dir {self.folder}: {told} would be replaced, but no run of train.py wrote {them}; name "
                f"another folder, or move {them} away"
            )

    def add(self, names: Iterable[str]) -> None:
        """List `names`, which are about to be written.

        Raises:
            FileExistsError: One of them exists and is not the folder's own.
            OSError: The manifest cannot be written.
        """
        names = set(names)
        for name in self.foreign(names):
            raise FileExistsError(
                errno.EEXIST, "is there already, and no run of train.py wrote it", str(self.folder / name)
            )
        self.own(names)

    def own(self, names: Iterable[str]) -> None:
        """List `names`, which this process has just written or is about to write.

        Raises:
            OSError: The manifest cannot be written.
        """
        if not set(names) <= (self._listed() or set()):
            self._write(self.names() | set(names))

    def write(self, files: Files) -> None:
        """Write `files` into the folder, each atomically.

        Raises:
            FileExistsError: One of them exists and is not the folder's own.
            OSError: A file or the manifest cannot be written.
        """
        self.add(files)
        write_files(self.folder, files)

    def remove(self, names: Iterable[str]) -> None:
        """Remove those of `names` that are the folder's own."""
        names = set(names) & self.names()
        if names:
            self.own(names)  # some files of an older version are recognized only beside others, so list all of them now
        for name in sorted(names):
            path = self.folder / name
            if path.is_dir():
                remove_folder(path)
            else:
                path.unlink()
        if names:
            self._write(self.names())

    def _listed(self) -> set[str] | None:
        """Return the names that the manifest lists; None if there is no manifest, or another file has its name."""
        try:
            found = json.loads(read_inside(self.folder, MANIFEST_FILE, MAX_BYTES))
            names = found["files"] if found["written_by"] == MARK else None
            return {name for name in names if re.fullmatch(PATTERN, name)}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def _write(self, names: Iterable[str]) -> None:
        content = {"written_by": MARK, "files": sorted(names)}
        write_files(self.folder, {MANIFEST_FILE: (json.dumps(content, indent=1) + "\n").encode()})

    def _stands(self, name: str) -> bool:
        return os.path.lexists(self.folder / name)
