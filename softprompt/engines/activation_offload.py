"""A store for activations: in memory up to a limit, and beyond the limit in an unnamed temporary file."""

import os
import tempfile
from collections import defaultdict
from collections.abc import Hashable
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple

import torch
from torch import Tensor

from softprompt.utils.errors import TrainingError


class _Spilled(NamedTuple):
    """Where a tensor is stored in the file; its shape and dtype, as a tensor on the meta device; and its device."""

    offset: int
    like: Tensor
    device: torch.device


class ActivationStore:
    """Stores tensors by key: the inputs of blocks and their gradients, for one window. It is a context manager; at the
    end of the context everything is discarded.

    The file in `folder` is created when `max_bytes` of memory are full. It is unlinked at once, so it does not outlive
    the process. Space in it is reused for tensors of the same size.
    """

    def __init__(self, max_bytes: int, folder: Path):
        self.max_bytes, self.folder = max_bytes, folder
        self._held: dict[Hashable, Tensor | _Spilled] = {}
        self._bytes = self._end = 0
        self._free = defaultdict[int, list[int]](list)  # unused offsets in the file, by the size of the space there
        self._file: IO[bytes] | None = None

    def __enter__(self) -> "ActivationStore":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._held.clear()
        if self._file:
            self._file.close()

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Store a tensor. There must be no tensor under the same key.

        Raises:
            TrainingError: The folder cannot be written to, or the disk is full.
        """
        if self._bytes + tensor.nbytes <= self.max_bytes or not tensor.nbytes:
            self._bytes += tensor.nbytes
            self._held[key] = tensor
        else:
            self._held[key] = self._spill(tensor)

    def get(self, key: Hashable) -> Tensor:
        """Return a stored tensor and keep it.

        Raises:
            TrainingError: The file cannot be read, or was truncated by something else.
        """
        held = self._held[key]
        return self._read(held) if isinstance(held, _Spilled) else held

    def pop(self, key: Hashable) -> Tensor:
        """Return a stored tensor and remove it.

        Raises:
            TrainingError: See `get`.
        """
        tensor, held = self.get(key), self._held.pop(key)
        if isinstance(held, _Spilled):
            self._free[tensor.nbytes].append(held.offset)
        else:
            self._bytes -= tensor.nbytes
        return tensor

    def _spill(self, tensor: Tensor) -> _Spilled:
        free = self._free[tensor.nbytes]
        offset = free.pop() if free else self._end
        self._end = max(self._end, offset + tensor.nbytes)
        try:
            if self._file is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115 (see __exit__)
            view, at = _bytes(tensor.detach().cpu().contiguous()), offset
            while len(view):
                count = os.pwrite(self._file.fileno(), view, at)
                view, at = view[count:], at + count
        except OSError as error:
            advice = "name a folder with more room, or give a larger --max_activation_gib"
            raise self._error(f"activations cannot be stored ({error.strerror})", advice) from None
        return _Spilled(offset, tensor.detach().to("meta"), tensor.device)

    def _error(self, what: str, advice: str) -> TrainingError:
        return TrainingError(f"--offload_folder {self.folder}: {what}; {advice}")

    def _read(self, spilled: _Spilled) -> Tensor:
        assert self._file is not None
        tensor = torch.empty_like(spilled.like, device="cpu")
        view, at = _bytes(tensor), spilled.offset
        while len(view):
            try:
                count = os.preadv(self._file.fileno(), [view], at)
            except OSError as error:
                raise self._error(f"activations cannot be read ({error.strerror})", "name another folder") from None
            if not count:
                raise self._error("the file of activations has become shorter", "name a folder that nothing else uses")
            view, at = view[count:], at + count
        return tensor.to(spilled.device)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.flatten().view(torch.uint8).numpy())
