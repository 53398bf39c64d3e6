"""Write answers to a .jsonl file line by line, so that an interrupted command can resume after the last complete line.

A note beside the file, `.NAME.run.json`, records what the answers depend on: the settings, the seed, the name of the
base, and hashes of the tokenizer and the adapters. A command resumes a file only if it would write the same note, and
if the file's lines answer its prompts.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from softprompt.utils.atomic_io import check_writable, write_files
from softprompt.utils.errors import DataError, OutputError
from softprompt.utils.file_lock import ProcessLock

Line = Mapping[str, Any]
MAX_LINE_BYTES = 1 << 20  # bytes of the first line that are read to recognize a file of infer.py
TOKENIZER, DTYPE = "tokenizer", "dtype"  # keys of the note that earlier versions did not write


class ResumableJsonl:
    """An output file with one line per prompt, in the order of the prompts.

    Use it as a context manager and `write` the lines from number `done` on. An incomplete last line is removed on
    entry.

    Args:
        asked: For each prompt, its line without the columns of the answer.
        depends_on: The content of the note; must be serializable as JSON.
        overwrite: Replace an existing file. It must be one that infer.py wrote: a note is beside it, or its first line
            has the columns of `asked` and others.

    Attributes:
        done: Number of complete lines that the file already has.

    Raises:
        OutputError: The file answers other prompts or was written with other settings, infer.py did not write it, it
            cannot be written to, or another process is writing to it.
        DataError: A line of the file is not JSON.
    """

    def __init__(self, path: str, asked: Sequence[Line], depends_on: Line, overwrite: bool = False):
        self.path, self.note = Path(path), Path(path).parent / f".{Path(path).name}.run.json"
        check_writable(self.path.parent, "--output_file")
        if self.path.is_dir():
            raise OutputError(f"--output_file {path} is a folder; name a file")
        file = self.path.resolve()
        self._lock = ProcessLock(file.parent / f".{file.name}.lock", f"--output_file {path}", "file")
        self._lock.refuse_if_held()
        self.depends_on, self.done, self._whole = depends_on, 0, 0
        self._size = None if overwrite else self.path.stat().st_size if self.path.exists() else 0
        if self.path.exists() and self.path.stat().st_size:
            if overwrite:
                self._check_is_ours(asked)
            else:
                self._check_note()
                self._check_lines(asked)

    def __enter__(self) -> "ResumableJsonl":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "ab")
        try:
            self._lock.take()
            if self._size not in (None, os.fstat(self._file.fileno()).st_size):
                raise OutputError(f"--output_file {self.path}: another process has written there; run this again")
        except (OSError, OutputError):
            self.__exit__(None, None, None)
            raise
        if not self.done:
            write_files(self.note.parent, {self.note.name: json.dumps(self.depends_on, ensure_ascii=False).encode()})
        self._file.truncate(self._whole)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        self._lock.release()

    def write(self, line: Line) -> None:
        """Append a line and flush it."""
        self._file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
        self._file.flush()

    def _check_is_ours(self, asked: Sequence[Line]) -> None:
        """Raise OutputError if infer.py did not write the file, so that it is not overwritten."""
        if read_note(self.note) is not None:
            return
        try:
            with open(self.path, "rb") as file:
                first = json.loads(file.readline(MAX_LINE_BYTES))
        except (OSError, ValueError, RecursionError):
            first = None
        if not isinstance(first, dict) or not first.keys() > set(asked[0] if asked else ()):
            raise OutputError(
                f"--output_file {self.path} holds no answers of infer.py, so it is not overwritten; name another file, "
                "or remove it"
            )

    def _check_note(self) -> None:
        """Raise OutputError if the note beside the file differs from `depends_on`."""
        found = read_note(self.note)
        if found is None:
            raise OutputError(f"--output_file {self.path} is not from a run of infer.py; {_WAY_OUT}")
        expected = json.loads(json.dumps(self.depends_on))
        found = {**{name: expected.get(name) for name in (TOKENIZER, DTYPE)}, **found}
        if other := [name for name in {**expected, **found} if expected.get(name) != found.get(name)]:
            values = ", ".join(f"{n} {json.dumps(found.get(n), ensure_ascii=False)}" for n in other)
            raise OutputError(f"--output_file {self.path} is from another run, with {values:.300}; {_WAY_OUT}")

    def _check_lines(self, asked: Sequence[Line]) -> None:
        """Check that each complete line of the file answers its prompt, and count them."""
        content = self.path.read_bytes()
        self._whole = content.rfind(b"\n") + 1
        lines = content[: self._whole].split(b"\n")[:-1]
        if len(lines) > len(asked):
            raise OutputError(
                f"--output_file {self.path} holds {len(lines)} answers, but there are {len(asked)} prompts; {_WAY_OUT}"
            )
        for number, (line, wanted) in enumerate(zip(lines, asked, strict=False), start=1):
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                raise DataError(f"--output_file {self.path}, line {number}: not JSON; {_WAY_OUT}") from None
            if not isinstance(found, dict) or any(found.get(name) != value for name, value in wanted.items()):
                raise OutputError(
                    f"--output_file {self.path}, line {number}: does not answer prompt {number}; {_WAY_OUT}"
                )
        self.done = len(lines)


def read_note(path: Path) -> dict[str, Any] | None:
    """Read the note beside an output file; None if there is none, or if the file is not a note."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def saved_seed(path: str) -> int | None:
    """Return the seed in the note of an output file, with which a command without --seed resumes; None if there is no
    such file or seed."""
    note = read_note(Path(path).parent / f".{Path(path).name}.run.json") if Path(path).exists() else None
    seed = (note or {}).get("seed")
    return seed if isinstance(seed, int) else None


_WAY_OUT = "name another file, or give --overwrite_output_file"
