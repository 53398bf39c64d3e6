"""Measures of the memory that a step takes, by counting the bytes of tensors."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


def bytes_saved_for_backward(base: nn.Module, run: Callable[[], Any]) -> int:
    """Bytes of the tensors that autograd saves while `run` runs, without those of the base; each storage counts once.
    What gradient checkpointing recomputes does not count."""
    own = {t.untyped_storage().data_ptr() for t in (*base.parameters(), *base.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in kept.values())


class PeakMemory(TorchDispatchMode):
    """Within this context, counts the bytes of all tensors that operations return and that are alive at the same time;
    `peak` is the largest sum. What an operation allocates within itself does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = [t.untyped_storage() for t in _tensors((args, kwargs))]
        out = func(*args, **(kwargs or {}))
        for storage in before:  # made before this context, or by an operation that returned a view
            self._known.add(storage)
        for tensor in _tensors(out):
            self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, size: int) -> None:
        self.live -= size


def _tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map_only(Tensor, found.append, values)
    return found
