"""The adapters that --adapter names. Importing this module does not import torch."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from softprompt.utils.errors import AdapterError
from softprompt.utils.named_folders import check_adapter_folder

NONE = "none"  # adapter name that stands for the base without a prompt
AdapterPath = str | os.PathLike[str]
AdapterSpecs = AdapterPath | Mapping[str, AdapterPath] | Sequence[AdapterPath] | None


def parse_adapter_specs(specs: AdapterSpecs) -> dict[str, str]:
    """Parse values of --adapter, each `FOLDER`, `name=FOLDER` or `none`, into folders by name. The default name of a
    folder is its path as given. Folders that are given by name are not parsed.

    Raises:
        AdapterError: A name has no folder, a name is given twice, or the name of a folder is `none`.
    """
    if isinstance(specs, Mapping):
        return {name: os.fspath(folder) for name, folder in specs.items()}
    folders: dict[str, str] = {}
    for spec in map(os.fspath, [specs] if isinstance(specs, str | os.PathLike) else specs or ()):
        name, equals, folder = spec.partition("=")
        folder = os.path.expanduser(folder)
        if not equals or Path(spec).exists():  # the path of a folder may contain "="
            name = folder = spec
        if not name or not folder or (name == NONE and folder != NONE):
            raise AdapterError(f"--adapter {spec}: expected FOLDER, name=FOLDER or none (the base without a prompt)")
        if name in folders:
            raise AdapterError(f"--adapter {name} is given twice; give each adapter its own name, name=FOLDER")
        folders[name] = folder
    return folders


def check_adapter_specs(specs: AdapterSpecs) -> None:
    """Check that every folder of `specs` exists.

    Raises:
        AdapterError: One does not; or see `parse_adapter_specs`.
    """
    for folder in parse_adapter_specs(specs).values():
        if folder != NONE:
            check_adapter_folder(folder)
