"""Gradient checkpointing (Chen et al. 2016, arXiv:1604.06174) of a frozen base's layers.

transformers' own gradient checkpointing acts only in train mode, and a frozen base is in eval mode.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from softprompt.utils.errors import ModelError


def layers_to_recompute(base: PreTrainedModel) -> list[nn.Module]:
    """Return the layers that support transformers' gradient checkpointing.

    Raises:
        ModelError: The base has no such layers.
    """
    layers = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(f"--gradient_checkpointing: {type(base).__name__} does not support it; leave it out")
    return layers


@contextmanager
def recomputed(
    layers: Sequence[nn.Module], context: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Iterator[None]:
    """Within this context, a forward keeps only the inputs of `layers`. The backward pass recomputes their other
    activations; for each layer, it calls `context` and recomputes within the context manager that it returns."""

    def run(forward: Any, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(
            partial(forward, **kwargs),
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), context()),
        )

    for layer in layers:
        layer.forward = partial(run, layer.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
