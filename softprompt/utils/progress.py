"""Progress bars and lines above them, on a terminal and in a notebook.

A terminal gets both on stderr. A notebook gets bars of its own kind (tqdm.auto) and the lines on stdout, because it
shows stderr on a red background. Elsewhere, such as in a file or a pipe, there are no bars.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm.auto import tqdm
from tqdm.utils import disp_len

from softprompt.utils.torchrun_env import is_main
from softprompt.utils.translation import translate

DELAY = 1.0  # seconds; shorter work gets no bar


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in shell.config


def log_stream() -> TextIO:
    """Return the stream for progress messages."""
    return sys.stdout if in_notebook() else sys.stderr


def shows_bars() -> bool:
    """Return whether bars are shown: on a terminal and in a notebook, and only by rank 0."""
    return is_main() and (in_notebook() or log_stream().isatty())


def say(text: str) -> None:
    """Write a line to `log_stream` without disturbing bars."""
    tqdm.write(translate(text), file=log_stream())


def bar_settings() -> dict[str, Any]:
    """Return the arguments of tqdm for a bar that appears after DELAY and disappears when it is closed, and that is
    disabled where none is shown."""
    return {"delay": DELAY, "leave": False, "dynamic_ncols": True, "file": log_stream(), "disable": not shows_bars()}


def progress_bar(total: int | None, desc: str, unit: str, **more: Any) -> "tqdm[Any]":
    """Return a bar with `bar_settings`.

    Args:
        desc: What is being done, such as "tokenizing".
        unit: What `total` counts, with a space before it if there should be one.
        more: Further arguments of tqdm, which override the settings.
    """
    return tqdm(total=total, desc=desc, unit=unit, **{**bar_settings(), **more})


@contextmanager
def rows_bar(rows: int, desc: str) -> Iterator[Callable[[int], object]]:
    """Show a bar over a number of rows. Yield a function that takes the number of rows that are done."""
    with progress_bar(rows, desc, " rows") as bar:
        yield lambda done: bar.update(done - bar.n)


def show_fields(bar: "tqdm[Any]", fields: Mapping[str, str]) -> None:
    """Show `fields` after a bar. If a terminal is too narrow for all of them and a bar of ten cells, the last fields
    are left out."""
    width = bar.format_dict.get("ncols")
    shown = dict(fields)
    while True:
        bar.set_postfix(shown, refresh=False)
        # Without a width, the bar has ten cells.
        if not shown or not width or disp_len(bar.format_meter(**{**bar.format_dict, "ncols": None})) <= width:
            return
        shown.popitem()
