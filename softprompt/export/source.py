"""What an export is made from: the adapter, the name of its base, and the folder to write."""

import os
from pathlib import Path
from typing import NamedTuple

from softprompt.export.args import ExportArguments
from softprompt.generation.adapters import LoadedAdapter
from softprompt.prompt.adapter_io import Adapter, load_adapter
from softprompt.runs.adapter_search import resolve_adapter
from softprompt.utils.atomic_io import check_writable
from softprompt.utils.errors import AdapterError, OutputError


class Source(NamedTuple):
    """An adapter that has been read.

    Attributes:
        folder: The adapter's folder.
        adapter: The content of its files.
        tuned: The same adapter for generation; its settings have been checked.
        base: Name or path of the base.
        output: The folder to write, which does not exist.
        dtype: The value of --dtype.
    """

    folder: str
    adapter: Adapter
    tuned: LoadedAdapter
    base: str
    output: Path
    dtype: str


def open_source(folder: str, arguments: ExportArguments) -> Source:
    """Read the adapter in `folder`.

    Raises:
        OutputError: The folder to write exists or cannot be written.
        AdapterError: The adapter is damaged, or names no base.
    """
    output = Path(str(arguments.output))
    if os.path.lexists(output):
        raise OutputError(f"--output {output} exists already; name a folder that does not, or remove it")
    check_writable(output, "--output")
    folder = str(resolve_adapter(folder))
    adapter = load_adapter(folder)
    base = arguments.model_name_or_path or adapter.base_model_name_or_path
    if base is None:
        raise AdapterError(f"adapter {folder}: names no base; give --model_name_or_path")
    return Source(folder, adapter, LoadedAdapter.from_files(folder, adapter), base, output, arguments.dtype)
