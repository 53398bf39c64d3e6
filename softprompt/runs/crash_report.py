"""Report unexpected errors: write the traceback to a file, and return one line for the user."""

import os
import platform
import shlex
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from softprompt.utils.errors import SoftpromptError
from softprompt.utils.redact import redacted

MAX_CHARACTERS = 300  # longer error messages are truncated to this length


@contextmanager
def crashes_in(folder: Path) -> Iterator[None]:
    """Mark errors raised inside the context as errors of the run in `folder`."""
    try:
        yield
    except Exception as error:
        error.output_dir = folder  # type: ignore[attr-defined]
        raise


class Failure(NamedTuple):
    """An error after which other work continues: one line, and, for an unexpected error, a report with the traceback as
    text. It holds no reference to the error's frames, and so keeps no tensors alive."""

    line: str
    report: str


def failure(error: Exception) -> Failure:
    """Describe an error as a `Failure`. A SoftpromptError has no report, because its message says everything."""
    from softprompt.utils.out_of_memory import is_out_of_memory

    what = " ".join(str(error).split())[:MAX_CHARACTERS]
    if isinstance(error, SoftpromptError):
        return Failure(what, "")
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and is_out_of_memory(error)):
        return Failure("out of memory; give a smaller batch or --max_length", _report(error))
    return Failure(redacted(f"unexpected {type(error).__name__}{': ' if what else ''}{what}"), _report(error))


def crash_line(error: BaseException) -> str:
    """Write the traceback of an unexpected error to a file in the run's folder, or else in the folder for temporary
    files.

    Returns:
        One line with the error, that file, and the run's newest complete checkpoint.
    """
    folder: Path | None = getattr(error, "output_dir", None)
    what = " ".join(str(error).split())[:MAX_CHARACTERS]
    file = _written(_report(error), folder)
    line = f"unexpected {type(error).__name__}{': ' if what else ''}{what}; "
    line += f"the traceback is in {file}" if file else "the traceback could not be written to any folder"
    if folder is not None:
        from softprompt.runs.train_state import way_on

        line += f"; {way_on(folder)}"
    return redacted(line)


def _report(error: BaseException) -> str:
    """Return a text with the command, the versions and the traceback."""
    versions = {name: module.__version__ for name in ("torch", "transformers") if (module := sys.modules.get(name))}
    head = [f"command: {shlex.join(sys.argv)}", f"python {platform.python_version()}, {platform.platform()}"]
    head += [f"{name} {version}" for name, version in versions.items()]
    return redacted("\n".join([*head, "", *traceback.format_exception(error)]))


def _written(report: str, folder: Path | None) -> Path | None:
    for place in (folder, Path(tempfile.gettempdir())):
        if place is None or not place.is_dir():
            continue
        try:
            descriptor, name = tempfile.mkstemp(prefix="crash-", suffix=".txt", dir=place)
            with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(report)
        except OSError:
            continue
        return Path(name)
    return None
