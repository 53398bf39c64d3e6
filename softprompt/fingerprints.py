"""What a run must not be resumed without, by content: its rows, its tokenizer, its base. Where they lie and what they
are called do not matter."""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.files import cache_dir, write_files
from softprompt.rows import Row

CACHED_FROM = 4 << 30  # bytes of weights; hashing fewer takes a few seconds
SAMPLE = 4096
OF_THE_PLACE = ("_name_or_path", "_commit_hash", "transformers_version", "dtype")


def fingerprint_of_rows(rows: Iterable[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def fingerprint_of_tokenizer(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def fingerprint_of_base(base: PreTrainedModel, files: Sequence[Path], keep: bool = True) -> str:
    """Of the configuration, and of names, shapes, dtypes and bytes of all tensors.

    The hash of a base of more than 4 GiB is kept (if `keep`), and taken as long as the `files` of its weights have the
    same place, size, time and inode, and the same goes for its configuration, names, shapes, and 4 KiB from both ends
    and the middle of every tensor. To hash it anew is to read every byte once.
    """
    if sum(t.nbytes for t in base.state_dict().values()) < CACHED_FROM or not files:
        return _hash(base, sampled=False)
    path = cache_dir("fingerprints") / _key(base, files)
    try:
        return _checked(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        found = _hash(base, sampled=False)
    if keep:
        with contextlib.suppress(OSError):  # a cache is a convenience
            path.parent.mkdir(parents=True, exist_ok=True)
            write_files(path.parent, {path.name: found.encode()})
    return found


def _checked(text: str) -> str:
    if len(text) != 64 or set(text) - set("0123456789abcdef"):
        raise ValueError("not a sha256")
    return text


def _key(base: PreTrainedModel, files: Sequence[Path]) -> str:
    stats = [(str(path.resolve()), path.stat()) for path in sorted(files)]
    places = [[name, stat.st_size, stat.st_mtime_ns, stat.st_ino] for name, stat in stats]
    return hashlib.sha256(json.dumps([places, _hash(base, sampled=True)]).encode()).hexdigest()


def _hash(base: PreTrainedModel, sampled: bool) -> str:
    config = {name: value for name, value in base.config.to_diff_dict().items() if name not in OF_THE_PLACE}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(base.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        for part in _samples(tensor) if sampled else [_bytes(tensor)]:
            digest.update(part.numpy().data)
    return digest.hexdigest()


def _samples(tensor: Tensor) -> Iterator[Tensor]:
    content = _bytes(tensor)
    for start in sorted({0, len(content) // 2, max(0, len(content) - SAMPLE)}):
        yield content[start : start + SAMPLE]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
