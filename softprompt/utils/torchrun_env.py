"""The environment variables that torchrun sets for the processes it starts."""

import os
import platform
from contextlib import suppress
from pathlib import Path


def launched_by_torchrun() -> bool:
    """Return whether torchrun started this process, even if it is the only one."""
    return "RANK" in os.environ


def is_main() -> bool:
    """Return whether this process is rank 0. A single process without torchrun counts as rank 0."""
    return os.environ.get("RANK", "0") == "0"


def is_distributed() -> bool:
    """Return whether the run has more than one rank."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def may_restart() -> bool:
    """Return whether torchrun restarts processes that end with an exit code other than 0 (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def launch_ids() -> tuple[str, str]:
    """Return a name for this node's torchrun process, unique to it and the same after restarts, and a name for this
    process.

    torchrun's run id does not identify its process, since it is "none" by default. Therefore the first name is the
    folder that torchrun creates for its workers' error files or, without one, torchrun's process id and start time.
    """
    folder = Path(os.environ.get("TORCHELASTIC_ERROR_FILE") or "/").parents
    # The file is FOLDER/attempt_N/LOCAL_RANK/error.json.
    launch = str(folder[2]) if len(folder) > 3 else _process_name(os.getppid())
    return f"{platform.node()} {launch}", f"{platform.node()} {_process_name(os.getpid())}"


def _process_name(process: int) -> str:
    """Return a process id, followed by the process's start time in clock ticks since boot where /proc has it."""
    with suppress(OSError):
        return f"{process} {Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()[19]}"
    return str(process)
