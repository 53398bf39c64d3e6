"""What a run must not be resumed without, by content: its rows and its base. Where they lie and what they are called do
not matter. See tokenizer_fingerprint.py for the tokenizer."""

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

CACHED_FROM = 4 << 30  # bytes of weights; hashing fewer takes a few seconds
SAMPLE = 4096
PIECE = 1 << 24  # bytes of a stored tensor that are read at a time
OF_THE_PLACE = ("_name_or_path", "_commit_hash", "transformers_version", "dtype")


def fingerprint_of_rows(rows: Iterable[Mapping[str, Any]]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def fingerprint_of_stored_base(config: PreTrainedConfig, files: Sequence[Path]) -> str:
    """Of a base that is not loaded: its configuration, and the content of the files of its weights, in order; a few
    seconds for each few GiB."""
    digest = hashlib.sha256(_configured(config).encode())
    for path in files:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def fingerprint_of_base(
    base: PreTrainedModel, files: Sequence[Path], keep: bool = True, blocks: Mapping[str, StoredTensor] | None = None
) -> str:
    """Of the configuration, and of names, shapes, dtypes and bytes of all tensors; a hollow base's `blocks` are read
    from their files.

    The hash of a base of more than 4 GiB is kept (if `keep`), and taken as long as the `files` of its weights have the
    same place, size, time and inode, and the same goes for its configuration, names, shapes, and 4 KiB from both ends
    and the middle of every tensor. To hash it anew is to read every byte once.
    """
    config, tensors = _configured(base.config), {**base.state_dict(), **(blocks or {})}
    if sum(t.nbytes for t in tensors.values()) < CACHED_FROM or not files:
        return _hash(config, tensors, sampled=False)
    places = [file_identity(path) for path in sorted(files)]
    key = hashlib.sha256(json.dumps([places, _hash(config, tensors, sampled=True)]).encode()).hexdigest()
    return cached_text(key, lambda: _hash(config, tensors, sampled=False), "[0-9a-f]{64}", keep)


def cached_text(key: str, make: Callable[[], str], pattern: str, keep: bool = True) -> str:
    """What was kept under `key` and matches `pattern`, else what `make` makes, which is kept (if `keep`)."""
    path = cache_dir("fingerprints") / key
    with contextlib.suppress(OSError, ValueError):
        if re.fullmatch(pattern, text := path.read_text(encoding="ascii")):
            return text
    made = make()
    if keep:
        with contextlib.suppress(OSError):  # a cache is a convenience
            path.parent.mkdir(parents=True, exist_ok=True)
            write_files(path.parent, {path.name: made.encode()})
    return made


def file_identity(path: Path) -> list[Any]:
    """What tells that a file is still the one that was read, without reading it."""
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _configured(config: PreTrainedConfig) -> str:
    """A base's configuration as JSON, without what only says where it lies and who wrote it."""
    values = {name: value for name, value in config.to_diff_dict().items() if name not in OF_THE_PLACE}
    return json.dumps(values, sort_keys=True, default=str)


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
        yield from (tensor.bytes(at, min(at + PIECE, tensor.nbytes)) for at in range(0, tensor.nbytes, PIECE))


def _samples(tensor: Tensor | StoredTensor) -> Iterator[Tensor]:
    size = tensor.nbytes
    for start in sorted({0, size // 2, max(0, size - SAMPLE)}):
        stop = min(start + SAMPLE, size)
        yield _bytes(tensor)[start:stop] if isinstance(tensor, Tensor) else tensor.bytes(start, stop)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
