"""Token ids of large datasets, kept by content: the same rows, template, tokenizer and cuts are tokenised once.

A file of the cache is safetensors: `ids` [all tokens] int32, and of each example (all [rows] int32) `lengths`, `asked`,
the tokens before its first target, `missing`, the tokens of its answer that were cut off, and `kept`, its row's number;
the counts of `Tokenized` and a checksum are its metadata.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from softprompt.data.tokenization import IGNORE, Example, Tokenized
from softprompt.utils.atomic_io import cache_dir, write_files
from softprompt.utils.tokenizer_fingerprint import fingerprint_of_tokenizer

LEAST_ROWS = 10_000  # fewer are tokenised in about the time that reading a cache takes
KEPT = 20  # files; the least recently written go first
VERSION = "3"  # of the format, and of what `tokenize` does
ARRAYS = ("ids", "lengths", "asked", "missing", "kept")
COUNTS = ("rows", "cut", "without_target", "empty_answers")


def cached(
    make: Callable[[], Tokenized],
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *settings: Any,
    read: bool = True,
    write: bool = True,
) -> Tokenized:
    """What `make` makes of the rows, from the cache where it has it, else made and kept there.

    `settings` are all else that it depends on, JSON-able. A cache that cannot be read or written is as good as none.
    """
    if len(rows) < LEAST_ROWS or getattr(tokenizer, "backend_tokenizer", None) is None:
        return make()
    key = _key(rows, fingerprint_of_tokenizer(tokenizer), [tokenizers.__version__, *settings])
    path = cache_dir("tokens") / f"{key}.safetensors"
    found = _read(path) if read else None
    if found is not None:
        return dataclasses.replace(found, cache=str(path))
    made = make()
    if write:
        _keep(path, made)
    return made


def _key(rows: Sequence[Mapping[str, Any]], tokenizer: str, settings: Sequence[Any]) -> str:
    digest = hashlib.sha256(json.dumps([VERSION, tokenizer, settings]).encode())
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _read(path: Path) -> Tokenized | None:
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata()
            arrays = [file.get_tensor(name) for name in ARRAYS]
        if metadata["sha256"] != _checksum(arrays, metadata):
            return None
        ids, lengths, asked, missing, kept = arrays
        rows = np.split(ids, lengths.cumsum()[:-1])
        examples = [_example(row.tolist(), int(n)) for row, n in zip(rows, asked, strict=True)]
        counts = {name: int(metadata[name]) for name in COUNTS}
        return Tokenized(examples, kept.tolist(), missing.tolist(), **counts)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def _checksum(arrays: Sequence[np.ndarray], counts: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps([counts[name] for name in COUNTS]).encode())
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def _example(ids: list[int], asked: int) -> Example:
    return Example(ids, [IGNORE] * asked + ids[asked:])


def _keep(path: Path, made: Tokenized) -> None:
    ids = [token for e in made.examples for token in e.input_ids]
    asked = [next(i for i, label in enumerate(e.labels) if label != IGNORE) for e in made.examples]
    lengths = [len(e.input_ids) for e in made.examples]
    arrays = [np.array(values, dtype=np.int32) for values in (ids, lengths, asked, made.missing, made.kept)]
    metadata = {name: str(getattr(made, name)) for name in COUNTS}
    metadata["sha256"] = _checksum(arrays, metadata)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)  # a reader of ids can read the rows
        write_files(path.parent, {path.name: save(dict(zip(ARRAYS, arrays, strict=True)), metadata=metadata)})
        for old in sorted(path.parent.glob("*.safetensors"), key=lambda p: p.stat().st_mtime)[:-KEPT]:
            old.unlink()
    except OSError:
        pass  # a cache is a convenience: a full disk or a home that takes no files must not stop a run
