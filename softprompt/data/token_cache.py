"""A cache of the token ids of large datasets. Rows are tokenized again only if the rows, the template, the tokenizer or
the truncation changed.

A cache file is a safetensors file. It holds the arrays of `Examples`, and `missing` and `kept` of `Tokenized` (int32
[rows]), under these names. Its metadata are the counts of `Tokenized` and a checksum. Readers memory-map the arrays, so
a file may be replaced or removed, but is never changed in place.

The cache of `datasets.map` is unsuitable: its key is a pickle of the tokenizer, which differs between processes; it
stores ids and labels as int64 lists; and it is never cleaned up.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from safetensors import SafetensorError, safe_open

from softprompt.data.examples import Examples
from softprompt.data.row_store import RowStore
from softprompt.data.tokenization import Tokenized
from softprompt.utils.atomic_io import cache_dir, write_files
from softprompt.utils.tokenizer_fingerprint import fingerprint_of_tokenizer

LEAST_ROWS = 10_000  # fewer are tokenized in about the time that reading a cache takes
KEPT = 20  # the most files in the cache; the least recently written are removed first
VERSION = "4"  # of the file format and of the behavior of `tokenize`
ARRAYS = {  # in the order in which a file holds them: the widest type first, so that each array is aligned
    "offsets": np.dtype(np.int64),
    **dict.fromkeys(("input_ids", "first_targets", "missing", "kept"), np.dtype(np.int32)),
}
COUNTS = ("rows", "cut", "without_target", "empty_answers")


def cached(
    make: Callable[[], Tokenized],
    rows: RowStore,
    tokenizer: Any,
    *settings: Any,
    read: bool = True,
    write: bool = True,
) -> Tokenized:
    """Return the cached result of `make` for these rows. If there is none, call `make` and cache its result.

    A cache file that cannot be read or written is ignored. A result that was just written is memory-mapped from the
    file, so that it does not stay in memory.

    Args:
        make: Tokenizes the rows.
        settings: Everything else that the result depends on; must be serializable as JSON.
        read: Whether to use a cached result.
        write: Whether to cache the result of `make`.
    """
    if len(rows) < LEAST_ROWS or getattr(tokenizer, "backend_tokenizer", None) is None:
        return make()
    depends_on = [VERSION, fingerprint_of_tokenizer(tokenizer), [tokenizers.__version__, *settings], rows.fingerprint]
    key = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()
    path = cache_dir("tokens") / f"{key}.safetensors"
    found = _read(path) if read else None
    if found is not None:
        return dataclasses.replace(found, cache=str(path))
    made = make()
    return (_read(path) or made) if write and _write(path, made) else made


def _read(path: Path) -> Tokenized | None:
    """Memory-map a cache file; return None if it cannot be read or is damaged."""
    try:
        with safe_open(path, framework="pt") as file:  # as numpy arrays they would be copied
            metadata = file.metadata()
            arrays = {name: file.get_tensor(name).numpy() for name in ARRAYS}
        if any(arrays[name].dtype != dtype for name, dtype in ARRAYS.items()):
            return None
        if metadata["sha256"] != _checksum(arrays, metadata):
            return None
        examples = Examples(*(arrays[name] for name in ("input_ids", "offsets", "first_targets")))
        counts = {name: int(metadata[name]) for name in COUNTS}
        return Tokenized(examples, memoryview(arrays["kept"]), memoryview(arrays["missing"]), **counts)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def _checksum(arrays: Mapping[str, np.ndarray], counts: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps([counts[name] for name in COUNTS]).encode())
    for name in ARRAYS:
        digest.update(f"{arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(arrays[name].data)
    return digest.hexdigest()


def _write(path: Path, made: Tokenized) -> bool:
    """Add a file to the cache, and remove the oldest ones above KEPT. Return whether this succeeded; a failure must not
    stop a run."""
    examples = made.examples
    arrays: dict[str, np.ndarray] = {
        "offsets": examples.offsets,
        "input_ids": examples.input_ids,
        "first_targets": examples.first_targets,
        "missing": np.frombuffer(made.missing, dtype=np.int32),
        "kept": np.frombuffer(made.kept, dtype=np.int32),
    }
    metadata = {name: str(getattr(made, name)) for name in COUNTS}
    metadata["sha256"] = _checksum(arrays, metadata)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)  # token ids reveal the rows, which may be private
        write_files(path.parent, {path.name: [_header(arrays, metadata), *(array.data for array in arrays.values())]})
        for old in sorted(path.parent.glob("*.safetensors"), key=lambda p: p.stat().st_mtime)[:-KEPT]:
            old.unlink()
    except OSError:
        return False
    return True


def _header(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """Return the header of a safetensors file. It is made here because the library's own `save` would copy every
    array."""
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for name, array in arrays.items():
        dtype = f"I{8 * array.itemsize}"
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
