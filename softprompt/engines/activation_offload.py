"""Tensors that are put away and taken back: in memory up to a bound, beyond it in a file that has no name."""

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
    """Where a tensor lies in the file, and a tensor without values that is like it."""

    offset: int
    like: Tensor
    device: torch.device


class ActivationStore:
    """What a window has at the borders of blocks. Used in a `with`, behind which all of it is gone.

    The file in `folder` is made when `most_bytes` of memory are full; it is unlinked from the start, so that nothing of
    it outlives the process. Places in it are used again for tensors of the same size.
    """

    def __init__(self, most_bytes: int, folder: Path):
        self.most_bytes, self.folder = most_bytes, folder
        self._held: dict[Hashable, Tensor | _Spilled] = {}
        self._bytes = self._end = 0
        self._free = defaultdict[int, list[int]](list)  # places in the file by their size
        self._file: IO[bytes] | None = None

    def __enter__(self) -> "ActivationStore":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._held.clear()
        if self._file:
            self._file.close()

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Raises TrainingError where the disk is full."""
        if self._bytes + tensor.nbytes <= self.most_bytes or not tensor.nbytes:
            self._bytes += tensor.nbytes
            self._held[key] = tensor
        else:
            self._held[key] = self._spill(tensor)

    def look(self, key: Hashable) -> Tensor:
        """A tensor that stays. Raises TrainingError where its file cannot be read, or has become shorter."""
        held = self._held[key]
        return self._read(held) if isinstance(held, _Spilled) else held

    def take(self, key: Hashable) -> Tensor:
        """A tensor that goes. Raises TrainingError as `look` does."""
        tensor, held = self.look(key), self._held.pop(key)
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
            way_out = "name a folder with more room, or give a larger --max_activation_gib"
            raise self._fault(f"no place for activations ({error.strerror})", way_out) from None
        return _Spilled(offset, tensor.detach().to("meta"), tensor.device)

    def _fault(self, what: str, way_out: str) -> TrainingError:
        return TrainingError(f"--offload_folder {self.folder}: {what}; {way_out}")

    def _read(self, spilled: _Spilled) -> Tensor:
        assert self._file is not None
        tensor = torch.empty_like(spilled.like, device="cpu")
        view, at = _bytes(tensor), spilled.offset
        while len(view):
            try:
                count = os.preadv(self._file.fileno(), [view], at)
            except OSError as error:
                raise self._fault(f"activations cannot be read ({error.strerror})", "name another folder") from None
            if not count:
                raise self._fault("the file of activations has become shorter", "name a folder that nothing else uses")
            view, at = view[count:], at + count
        return tensor.to(spilled.device)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.flatten().view(torch.uint8).numpy())
