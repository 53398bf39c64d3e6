"""A .jsonl of answers that grows line by line: whole lines are kept whatever happens, and the same command goes on.

Beside it, under `.NAME.run.json`, stands what the answers depend on: settings, seed, the base's name, and tokenizer and
adapters by content.
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
MOST_BYTES = 1 << 20  # of a line that is looked at
TOKENIZER = "tokenizer"


class ResumableJsonl:
    """Answers to `asked`, lines without their answers, in their order. `done` of them are there already; a last line
    that was torn off is taken away.

    Raises:
        OutputError: the file holds answers to other questions, with other settings, or is not one of ours. One that is
            to be overwritten must be one of ours, too: with a note beside it, or an answer in its first line.
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
                self._read(asked)

    def __enter__(self) -> "ResumableJsonl":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "ab")
        try:
            self._lock.take()
            if self._size not in (None, os.fstat(self._file.fileno()).st_size):
                raise OutputError(f"--output_file {self.path}: another process has written there; run this once more")
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
        self._file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
        self._file.flush()

    def _check_is_ours(self, asked: Sequence[Line]) -> None:
        if noted(self.note) is not None:
            return
        try:
            with open(self.path, "rb") as file:
                first = json.loads(file.readline(MOST_BYTES))
        except (OSError, ValueError, RecursionError):
            first = None
        if not isinstance(first, dict) or not first.keys() > set(asked[0] if asked else ()):
            raise OutputError(
                f"--output_file {self.path} holds no answers of infer.py, and is not overwritten; name another file, "
                "or remove it"
            )

    def _check_note(self) -> None:
        found = noted(self.note)
        if found is None:
            raise OutputError(f"--output_file {self.path} is not from a run of infer.py; {_WAY_OUT}")
        expected = json.loads(json.dumps(self.depends_on))
        found.setdefault(TOKENIZER, expected.get(TOKENIZER))  # earlier versions did not note it
        if other := [name for name in {**expected, **found} if expected.get(name) != found.get(name)]:
            told = ", ".join(f"{n} {json.dumps(found.get(n), ensure_ascii=False)}" for n in other)
            raise OutputError(f"--output_file {self.path} is from another run, with {told:.300}; {_WAY_OUT}")

    def _read(self, asked: Sequence[Line]) -> None:
        content = self.path.read_bytes()
        self._whole = content.rfind(b"\n") + 1
        lines = content[: self._whole].split(b"\n")[:-1]
        if len(lines) > len(asked):
            raise OutputError(
                f"--output_file {self.path} holds {len(lines)} answers, and there are {len(asked)} prompts; {_WAY_OUT}"
            )
        for number, (line, wanted) in enumerate(zip(lines, asked, strict=False), start=1):
            try:
                found = json.loads(line)
            except ValueError:
                raise DataError(f"--output_file {self.path}, line {number}: not JSON; {_WAY_OUT}") from None
            if not isinstance(found, dict) or any(found.get(name) != value for name, value in wanted.items()):
                raise OutputError(
                    f"--output_file {self.path}, line {number}: answers another prompt than number {number}; {_WAY_OUT}"
                )
        self.done = len(lines)


def noted(note: Path) -> dict[str, Any] | None:
    """What stands beside an output file; None where that is nothing of ours."""
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def noted_seed(path: str) -> int | None:
    """The seed that an output file was begun with, where none was given: its other samples go on with it."""
    found = noted(Path(path).parent / f".{Path(path).name}.run.json") if Path(path).exists() else None
    seed = (found or {}).get("seed")
    return seed if isinstance(seed, int) else None


_WAY_OUT = "name another file, or give --overwrite_output_file"
