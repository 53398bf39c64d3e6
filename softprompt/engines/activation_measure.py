"""How much memory a base keeps for the backward pass, measured on two short rows.

Autograd's saved tensors are counted, so the result depends on the base's modules, dtypes and sizes, but not on time or
free memory: equal machines cut a run into the same micro-batches.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.models.capabilities import max_positions
from softprompt.models.loading import word_embeddings
from softprompt.utils.model_config import layers_and_heads

SHORT = 16  # tokens of the shorter row; the other one has twice as many


class ActivationMeasure(NamedTuple):
    """A row of T tokens keeps linear · T + quadratic · T² bytes until its backward pass.

    Attributes:
        layers: Number of layers.
        hidden: Bytes of a token's hidden state, which is what gradient checkpointing keeps per layer.
    """

    linear: float
    quadratic: float
    layers: int
    hidden: int

    def bytes(self, tokens: int, width: int, gradient_checkpointing: bool = False) -> int:
        """Estimate the bytes of `tokens` tokens in rows of `width` tokens."""
        token = self.linear + self.quadratic * width
        if gradient_checkpointing:  # the inputs of all layers, and everything in one of them
            token = self.layers * self.hidden + token / self.layers
        return round(tokens * token)


def measure_activations(base: PreTrainedModel, run: Callable[[Tensor], Tensor]) -> ActivationMeasure:
    """Measure what `run` keeps.

    Args:
        run: Runs one row's embeddings [T, H] through the base, with a graph.
    """
    T = max(1, min(SHORT, (max_positions(base) or 2 * SHORT) // 2))
    short, long = (_saved_bytes(base, run, tokens) for tokens in (T, 2 * T))
    quadratic = max(0.0, (long - 2 * short) / (2 * T**2))
    H = word_embeddings(base).weight.shape[1]
    layers, _ = layers_and_heads(base.config)
    return ActivationMeasure(short / T - quadratic * T, quadratic, layers, 4 * H)


def _saved_bytes(base: PreTrainedModel, run: Callable[[Tensor], Tensor], T: int) -> int:
    """Return the bytes of the tensors that autograd saves for a row of T tokens, without the base's own tensors."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> None:  # the storage alone: there is no backward pass, and a tensor would keep its graph
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()

    weight = word_embeddings(base).weight
    embeddings = torch.zeros(T, weight.shape[1], device=weight.device, requires_grad=True)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda nothing: nothing):
        run(embeddings + weight[:1].detach().float())
    own = {t.untyped_storage().data_ptr() for t in (*base.parameters(), *base.buffers())}
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in own)
