"""What torchrun tells a process that it started, all of it in the environment."""

import os
import platform
from contextlib import suppress
from pathlib import Path


def launched() -> bool:
    """Whether torchrun started this process, be it the only one."""
    return "RANK" in os.environ


def is_main() -> bool:
    """Whether this is rank 0, as one process alone is."""
    return os.environ.get("RANK", "0") == "0"


def may_restart() -> bool:
    """Whether torchrun takes every exit code but 0 for a fault, and starts again what ended so."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def launch() -> str:
    """What names this node's torchrun: the same at each start, and another one's never. Its own id is "none" unless it
    was given one, so its process and when that began stand beside it."""
    parent, began = os.getppid(), ""
    with suppress(OSError):
        began = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]  # in ticks since the boot
    return f"{os.environ.get('TORCHELASTIC_RUN_ID')} {platform.node()} {parent} {began}"
