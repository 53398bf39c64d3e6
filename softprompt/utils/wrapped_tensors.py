"""Tensors of classes that wrap other tensors, such as the quantized weights of torchao and the slices of a DTensor."""

from collections.abc import Iterator

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def stored_parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensors whose storages hold the data of `tensor`: those that it wraps, else itself."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for part in (getattr(tensor, name) for name in names):
        if isinstance(part, Tensor):  # a DTensor also names its mesh
            yield from stored_parts(part)
