"""Find the adapter to use: the newest one, or the one in a folder that the user names. That folder may be a run that
has not ended."""

from collections.abc import Callable, Iterator
from pathlib import Path

from softprompt.prompt.file_names import CONFIG_FILE, WEIGHTS_FILE
from softprompt.runs.checkpoints import checkpoints, fault_of
from softprompt.runs.file_names import CHECKSUMS_FILE
from softprompt.runs.own_files import MANIFEST_FILE
from softprompt.utils import progress
from softprompt.utils.errors import AdapterError
from softprompt.utils.file_lock import FolderLock
from softprompt.utils.shell_commands import command

PICKLE_FILE = "adapter_model.bin"
Say = Callable[[str], object]


def resolve_adapter(folder: str | Path, say: Say = progress.say) -> Path:
    """Return the adapter folder that a user means by `folder`: `folder` itself or, if it is a run's folder without a
    final prompt, the run's newest complete checkpoint.

    Args:
        folder: The folder; a leading ~ is expanded.
        say: Called with a sentence that names the checkpoint, if one is taken.

    Raises:
        AdapterError: The run has saved no prompt yet, or none of its checkpoints is whole.
    """
    folder = Path(folder).expanduser()
    if any((folder / name).exists() for name in (CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE)):
        return folder
    faults = {}
    for checkpoint in reversed(checkpoints(folder)):
        if fault := _fault(checkpoint):
            faults[checkpoint.name] = fault
            continue
        passed = "".join(f"; {name} is not whole ({fault})" for name, fault in faults.items())
        say(f"adapter {folder}: the run has not ended; using its newest complete checkpoint, {checkpoint.name}{passed}")
        return checkpoint
    if faults:
        told = "; ".join(f"{name}: {fault}" for name, fault in faults.items())
        raise AdapterError(f"adapter {folder}: the run has not ended, and no checkpoint in it is whole ({told})")
    if _is_run(folder):
        raise AdapterError(
            f"adapter {folder}: the run has saved no prompt yet; wait for its first checkpoint (--save_steps) or its "
            "end, or name another adapter"
        )
    return folder


def newest_adapter(runs: Path, say: Say = progress.say) -> Path | None:
    """Return the folder of the adapter that was written last; None if there is none.

    Args:
        runs: A folder of runs, which are searched together with their checkpoints.
        say: Called with a sentence for each newer checkpoint that is not whole, and for each newer run that has saved
            no prompt yet.
    """
    waiting = [run for run in _folders(runs) if _is_run(run) and not list(_adapters(run))]
    for adapter in adapters_under(runs):
        if fault := _fault(adapter):
            say(f"{adapter}: {fault}; using the adapter before it")
            continue
        written = _written(adapter / WEIGHTS_FILE) or 0
        for run in waiting:
            if FolderLock(run).is_held() or (_written(run) or 0) > written:
                say(f"{run} is newer but has saved no prompt yet; using {adapter}")
        return adapter
    if waiting:
        say(f"{', '.join(map(str, waiting))}: no prompt has been saved yet")
    return None


def adapters_under(runs: Path) -> list[Path]:
    """Return the adapter folders in a folder of runs, those of runs and of their checkpoints, the newest first."""
    found = {path: written for run in _folders(runs) for path in _adapters(run) if (written := _written(path))}
    # The final prompt of a run comes before its checkpoints, because it was written last.
    return [path.parent for path in sorted(found, key=lambda path: found[path], reverse=True)]


def no_adapter(runs: Path) -> AdapterError:
    """Return the error for a command that needs an adapter, where `newest_adapter` has found none."""
    return AdapterError(f"no trained adapter under {runs}/; run `{command('train')}` first, or name one with --adapter")


def _fault(adapter: Path) -> str | None:
    """Return what is wrong with an adapter folder; None if no fault is found. Only checkpoints have checksums to
    compare; in the folder of a run, or one that PEFT wrote, only missing files are found."""
    if (adapter / CHECKSUMS_FILE).exists():
        return fault_of(adapter)
    return next((f"{name} is missing" for name in (CONFIG_FILE, WEIGHTS_FILE) if not (adapter / name).exists()), None)


def _is_run(folder: Path) -> bool:
    return (folder / MANIFEST_FILE).exists() or FolderLock(folder).is_held()


def _folders(runs: Path) -> list[Path]:
    return sorted(path for path in runs.glob("*") if path.is_dir())


def _adapters(run: Path) -> Iterator[Path]:
    """Yield the weights of a run's final prompt, and those of its checkpoints."""
    yield from (path for path in (run / WEIGHTS_FILE, *run.glob(f"checkpoint-*/{WEIGHTS_FILE}")) if path.exists())


def _written(path: Path) -> int | None:
    """Return a file's modification time in ns; None if it no longer exists, because runs remove old checkpoints."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None
