"""Token ids of large datasets, kept by content: the same rows, template, tokenizer and cuts are tokenised once.

A file of the cache is safetensors: `ids` [all tokens] int32, and of each example `lengths` [rows] int32 and `asked`
[rows] int32, the tokens before its first target; the counts of `Tokenized` are its metadata.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from softprompt.data import IGNORE, Example, Tokenized
from softprompt.files import write_files

LEAST_ROWS = 10_000  # fewer are tokenised in about the time that reading a cache takes
KEPT = 20  # files; the least recently written go first
VERSION = "1"  # of the format, and of what `tokenize` does
COUNTS = ("rows", "cut", "without_target", "empty_answers")


def cache_dir() -> Path:
    """$XDG_CACHE_HOME/softprompt/tokens, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "softprompt" / "tokens"


def cached(
    make: Callable[[], Tokenized], rows: Sequence[Mapping[str, Any]], tokenizer: Any, *settings: Any, anew: bool = False
) -> Tokenized:
    """What `make` makes of the rows, from the cache where it has it (unless `anew`), else made and kept there.

    `settings` are all else that it depends on, JSON-able. A cache that cannot be read or written is as good as none.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if len(rows) < LEAST_ROWS or backend is None:
        return make()
    path = cache_dir() / f"{_key(rows, backend.to_str(), [tokenizer.eos_token, *settings])}.safetensors"
    found = None if anew else _read(path)
    if found is not None:
        return dataclasses.replace(found, cache=str(path))
    made = make()
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
            counts = {name: int(file.metadata()[name]) for name in COUNTS}
            ids, lengths, asked = (file.get_tensor(name) for name in ("ids", "lengths", "asked"))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
    if lengths.sum() != len(ids) or len(lengths) != len(asked):
        return None
    rows = np.split(ids, lengths.cumsum()[:-1])
    return Tokenized([_example(row.tolist(), int(n)) for row, n in zip(rows, asked, strict=True)], **counts)


def _example(ids: list[int], asked: int) -> Example:
    return Example(ids, [IGNORE] * asked + ids[asked:])


def _keep(path: Path, made: Tokenized) -> None:
    asked = [next(i for i, label in enumerate(e.labels) if label != IGNORE) for e in made.examples]
    tensors = {
        "ids": np.array([token for e in made.examples for token in e.input_ids], dtype=np.int32),
        "lengths": np.array([len(e.input_ids) for e in made.examples], dtype=np.int32),
        "asked": np.array(asked, dtype=np.int32),
    }
    counts = {name: str(getattr(made, name)) for name in COUNTS}
    try:
        write_files(path.parent, {path.name: save(tensors, metadata=counts)})
        for old in sorted(path.parent.glob("*.safetensors"), key=lambda p: p.stat().st_mtime)[:-KEPT]:
            old.unlink()
    except OSError:
        pass  # a cache is a convenience: a full disk or a home that takes no files must not stop a run
