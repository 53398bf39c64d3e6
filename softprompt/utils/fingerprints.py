"""Fingerprints (SHA-256) of a run's rows and base, by content; their paths and names do not matter.

A run is resumed only with the same rows and base. See tokenizer_fingerprint.py for the tokenizer.
`datasets.fingerprint.Hasher` would hash pickles, which differ between versions of Python and of the libraries.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from softprompt.utils.atomic_io import cache_dir, write_files
from softprompt.utils.safetensors_io import StoredTensor

CACHED_FROM = 4 << 30  # cache the hash of at least this many bytes of weights; hashing fewer takes a few seconds
SAMPLE = 4096  # bytes per sample of a tensor, for the key of the cache
CHUNK_BYTES = 1 << 24  # read at a time from a stored tensor
IGNORED_SETTINGS = ("_name_or_path", "_commit_hash", "transformers_version", "dtype")


def fingerprint_of_rows(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the fingerprint of rows, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def fingerprint_of_stored_base(config: PreTrainedConfig, files: Sequence[Path], keep: bool = False) -> str:
    """Return the fingerprint of a base as it is stored: of its configuration and of the content of its weight files, in
    order. This takes a few seconds for every few GiB, so the hash of at least 4 GiB is cached, as in
    `fingerprint_of_base`; it is used as long as the configuration and the files' paths, sizes, modification times and
    inodes are the same.

    Args:
        keep: Whether to write the hash to the cache.
    """
    configured = _configured(config)
    if sum(path.stat().st_size for path in files) < CACHED_FROM:
        return _hash_files(configured, files)
    places = json.dumps([configured, [file_identity(path) for path in files]])
    key = hashlib.sha256(places.encode()).hexdigest()
    return cached_text(key, lambda: _hash_files(configured, files), "[0-9a-f]{64}", keep)


def fingerprint_of_base(
    base: PreTrainedModel, files: Sequence[Path], keep: bool = True, blocks: Mapping[str, StoredTensor] | None = None
) -> str:
    """Return the fingerprint of a base: of its configuration, and of the name, shape, dtype and bytes of every tensor.

    Hashing reads every byte once, so the hash of a base of at least 4 GiB is cached. The cached hash is used as long as
    the weight files have the same path, size, modification time and inode, and the configuration, all names, shapes and
    dtypes, and 4 KiB from the beginning, middle and end of every tensor are the same.

    Args:
        base: The loaded base; its blocks may be on the meta device.
        files: The files that its weights were loaded from.
        keep: Whether to write the hash to the cache.
        blocks: Tensors that are on the meta device in `base`, to be read from their files.
    """
    config, tensors = _configured(base.config), {**base.state_dict(), **(blocks or {})}
    if sum(t.nbytes for t in tensors.values()) < CACHED_FROM or not files:
        return _hash(config, tensors, sampled=False)
    places = [file_identity(path) for path in sorted(files)]
    key = hashlib.sha256(json.dumps([places, _hash(config, tensors, sampled=True)]).encode()).hexdigest()
    return cached_text(key, lambda: _hash(config, tensors, sampled=False), "[0-9a-f]{64}", keep)


def cached_text(key: str, make: Callable[[], str], pattern: str, keep: bool = True) -> str:
    """Return the cached text for `key` if it matches `pattern`; else call `make`, and cache its result if `keep`."""
    path = cache_dir("fingerprints") / key
    with contextlib.suppress(OSError, ValueError):
        if re.fullmatch(pattern, text := path.read_text(encoding="ascii")):
            return text
    made = make()
    if keep:
        with contextlib.suppress(OSError):  # the cache is optional
            path.parent.mkdir(parents=True, exist_ok=True)
            write_files(path.parent, {path.name: made.encode()})
    return made


def file_identity(path: Path) -> list[Any]:
    """Return path, size, modification time (ns) and inode, which show without reading a file whether it has changed."""
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _configured(config: PreTrainedConfig) -> str:
    """Return a configuration as JSON, without its path, the version of transformers that wrote it, and the dtype in
    which the weights were saved."""
    values = {name: value for name, value in config.to_diff_dict().items() if name not in IGNORED_SETTINGS}
    return json.dumps(values, sort_keys=True, default=str)


def _hash_files(config: str, files: Sequence[Path]) -> str:
    digest = hashlib.sha256(config.encode())
    for path in files:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _hash(config: str, tensors: Mapping[str, Tensor | StoredTensor], sampled: bool) -> str:
    digest = hashlib.sha256(config.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        for part in _samples(tensor) if sampled else _all(tensor):
            digest.update(part.numpy().data)
    return digest.hexdigest()


def _all(tensor: Tensor | StoredTensor) -> Iterator[Tensor]:
    if isinstance(tensor, Tensor):
        yield _bytes(tensor)
    else:
        yield from (
            tensor.bytes(at, min(at + CHUNK_BYTES, tensor.nbytes)) for at in range(0, tensor.nbytes, CHUNK_BYTES)
        )


def _samples(tensor: Tensor | StoredTensor) -> Iterator[Tensor]:
    size = tensor.nbytes
    for start in sorted({0, size // 2, max(0, size - SAMPLE)}):
        stop = min(start + SAMPLE, size)
        yield _bytes(tensor)[start:stop] if isinstance(tensor, Tensor) else tensor.bytes(start, stop)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
