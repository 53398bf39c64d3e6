"""Checks of folders that a user names. They import no torch, so that a command refuses a wrong name at once."""

from pathlib import Path

from softprompt.utils.errors import AdapterError, ReportError


def check_adapter_folder(folder: str | Path) -> None:
    """Raise AdapterError if there is no such folder of an adapter; a leading ~ is expanded."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise AdapterError(f"adapter {path}: no such folder; give an OUTPUT_DIR or checkpoint-N of train.py")


def check_run_folder(folder: str | Path) -> None:
    """Raise ReportError if there is no such folder of a run."""
    if not Path(folder).is_dir():
        raise ReportError(f"{folder}: no such folder; name the OUTPUT_DIR of a run")
