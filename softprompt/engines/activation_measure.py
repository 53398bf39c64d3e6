"""Measure on a few short rows how much memory a base keeps for the backward pass.

The bytes of the tensors that autograd saves are counted. They depend on the base's modules, dtypes and sizes, but not
on the free memory, so equal machines cut a run into the same micro-batches.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.models.capabilities import max_positions
from softprompt.models.loading import word_embeddings
from softprompt.utils.model_config import layers_and_heads
from softprompt.utils.wrapped_tensors import stored_parts

SHORT = 16  # tokens of the shorter row; the longer one has twice as many
GRADIENTS = 0.25  # size of the gradients within a layer at one time, relative to its saved tensors


class ActivationMeasure(NamedTuple):
    """The memory that a row of T tokens behind P virtual tokens keeps until its backward pass: linear · T +
    quadratic · T · (P + T) + prefix · P bytes.

    Attributes:
        linear: Bytes per token.
        quadratic: Bytes per pair of a token and one of the P + T tokens that it may attend to.
        prefix: Bytes per virtual token, such as copies of its keys and values for each row.
        layers: L, the number of layers.
        hidden: Bytes of one token's hidden state in fp32. Gradient checkpointing keeps one per token and layer.
    """

    linear: float
    quadratic: float
    prefix: float
    layers: int
    hidden: int

    def bytes(self, lengths: Sequence[int], P: int = 0, gradient_checkpointing: bool = False) -> int:
        """Estimate the bytes that rows of `lengths` tokens keep behind P virtual tokens, which all of them share."""
        tokens, rows = sum(lengths), len(lengths)
        pairs = sum(T * (P + T) for T in lengths)
        kept = self.linear * tokens + self.quadratic * pairs + self.prefix * P * rows
        if gradient_checkpointing:  # the inputs of all layers, and all saved tensors and gradients of one layer
            kept = self.layers * self.hidden * tokens + (1 + GRADIENTS) * kept / self.layers
        return round(kept)


def measure_activations(
    base: PreTrainedModel, run: Callable[[Tensor, int], object], behind_prompt: bool = False
) -> ActivationMeasure:
    """Measure the memory that `run` keeps for the backward pass.

    Args:
        run: Runs one row's embeddings [T, H] behind P virtual tokens through the base, without its head.
        behind_prompt: Whether `run` supports P > 0; if not, `prefix` is 0.
    """
    T = max(1, min(SHORT, (max_positions(base) or 2 * SHORT) // 2))
    short, long = (_saved_bytes(base, run, tokens) for tokens in (T, 2 * T))
    quadratic = max(0.0, (long - 2 * short) / (2 * T**2))
    linear = short / T - quadratic * T
    prefix = 0.0
    if behind_prompt:
        prefix = max(0.0, _saved_bytes(base, run, T, T) / T - linear - quadratic * 2 * T)
    H = word_embeddings(base).weight.shape[1]
    layers, _ = layers_and_heads(base.config)
    return ActivationMeasure(linear, quadratic, prefix, layers, 4 * H)


def _saved_bytes(base: PreTrainedModel, run: Callable[[Tensor, int], object], T: int, P: int = 0) -> int:
    """Return the bytes of the tensors that autograd saves for a row of T tokens behind P virtual tokens. The base's
    parameters and buffers do not count: those of a sharded layer are gathered into memory that is released after the
    layer's forward."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> None:  # keep only the storages: a tensor would keep its graph alive
        kept.update((part.untyped_storage().data_ptr(), part.untyped_storage()) for part in stored_parts(tensor))

    weight = word_embeddings(base).weight
    embeddings = torch.zeros(T, weight.shape[1], device=weight.device, requires_grad=True)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda nothing: nothing):
        run(embeddings + weight[:1].detach().float(), P)
    resident = (t for t in (*base.parameters(), *base.buffers()) if not hasattr(t, "to_local"))  # no slices
    own = {part.untyped_storage().data_ptr() for t in resident for part in stored_parts(t)}
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in own)
