"""Load datasets with the library `datasets`: folders of save_to_disk, and datasets of the hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from softprompt.data.readers import READERS
from softprompt.utils import hub
from softprompt.utils.errors import DataError, first_line


def load_folder(path: Path) -> Any:
    """Load the Dataset or DatasetDict that save_to_disk wrote into a folder; its rows are memory-mapped.

    Raises:
        DataError: The folder holds neither.
    """
    from datasets import load_from_disk

    try:
        return load_from_disk(str(path))
    except Exception as error:
        raise DataError(
            f"{path}: expected a folder of Dataset.save_to_disk that holds rows, or of {', '.join(READERS)} files: "
            f"{first_line(error)}"
        ) from None


def load_hub_dataset(source: str, config_name: str | None) -> Any:
    """Load the DatasetDict of a hub id.

    Raises:
        DataError: There is no such dataset, or the hub cannot be reached.
    """
    from datasets import load_dataset

    return from_hub(source, lambda: load_dataset(source, config_name))


def from_hub(source: str, load: Callable[[], Any]) -> Any:
    """Call `load`, which accesses the hub, and return its result.

    Raises:
        DataError: `load` fails; the message gives the reason and advice.
    """
    hub.check_reachable()
    try:
        return load()
    except Exception as error:
        raise DataError(
            f"dataset {source!r}: no such file or folder here, and not loadable from the hub "
            f"({first_line(error)}); {hub.advice()}"
        ) from None
