"""What torchrun tells a process that it started, all of it in the environment."""

import os
import platform
from contextlib import suppress
from pathlib import Path


def launched_by_torchrun() -> bool:
    """Whether torchrun started this process, be it the only one."""
    return "RANK" in os.environ


def is_main() -> bool:
    """Whether this is rank 0, as one process alone is."""
    return os.environ.get("RANK", "0") == "0"


def is_distributed() -> bool:
    """Whether this is one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def may_restart() -> bool:
    """Whether torchrun takes every exit code but 0 for a fault, and starts again what ended so."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def launch_ids() -> tuple[str, str]:
    """What names this node's torchrun, the same at each start and another one's never, and what names this process.

    Its own id is "none" unless it was given one, so the folder stands for it that it makes for its workers' last words;
    without that, its process."""
    folder = Path(os.environ.get("TORCHELASTIC_ERROR_FILE") or "/").parents
    launch = str(folder[2]) if len(folder) > 3 else _named(os.getppid())  # FOLDER/attempt_N/LOCAL_RANK/error.json
    return f"{platform.node()} {launch}", f"{platform.node()} {_named(os.getpid())}"


def _named(process: int) -> str:
    """A process and when it began, in ticks since the boot, where the system tells that."""
    with suppress(OSError):
        return f"{process} {Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()[19]}"
    return str(process)
