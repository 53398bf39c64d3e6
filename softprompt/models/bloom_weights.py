"""The frozen weights of a BLOOM, layer by layer: the packed engine asks a provider and does not know where they lie."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel


class LinearParams(NamedTuple):
    """Scale and shift of a layer norm, [H] fp32 each; or weight [out, in] in the compute dtype and bias [out] fp32."""

    weight: Tensor
    bias: Tensor


class BlockWeights(NamedTuple):
    """One block of BLOOM. `query_key_value` has its 3·H outputs in the order [N, 3, D]."""

    input_layernorm: LinearParams  # [H]
    query_key_value: LinearParams  # [3H, H]
    dense: LinearParams  # [H, H]
    post_attention_layernorm: LinearParams  # [H]
    dense_h_to_4h: LinearParams  # [4H, H]
    dense_4h_to_h: LinearParams  # [H, 4H]


MODULES = (  # of a block of transformers' BLOOM, in the order of a Layer
    *("input_layernorm", "self_attention.query_key_value", "self_attention.dense"),
    *("post_attention_layernorm", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
)


class Shape(NamedTuple):
    """Sizes in the letters used everywhere, and the two constants of BLOOM's forward."""

    L: int
    N: int
    D: int
    H: int
    V: int
    epsilon: float
    residual_after_layernorm: bool


class Weights(Protocol):
    """A provider."""

    shape: Shape
    embedding_layernorm: LinearParams
    final_layernorm: LinearParams
    head: Tensor  # [V, H] in the compute dtype
    own_bytes: int  # of what is held beside the base's own tensors

    def embed(self, ids: Tensor) -> Tensor:
        """Word embeddings before their layer norm: [...] int64 → [..., H] fp32."""
        ...

    def through(self, order: Sequence[int]) -> Iterator[BlockWeights]:
        """The layers of these numbers, one after the other. A provider that does not hold them all may write the next
        but one over a layer: it is good until the next one is asked for."""
        ...


class NonBlockWeights:
    """What a base has but for its layers, in the memory of one device: the base's own tensors, not copies of them, but
    for a tied head, which the compute dtype needs a second time where that is not the embeddings' own."""

    def __init__(self, base: PreTrainedModel, compute_dtype: torch.dtype):
        self.shape = bloom_shape(base.config)
        self.embedding_layernorm = _affine(base.transformer.word_embeddings_layernorm)
        self.final_layernorm = _affine(base.transformer.ln_f)
        head = base.get_output_embeddings().weight.detach()
        self.head: Tensor = head.to(compute_dtype)
        self.own_bytes = 0 if self.head is head else self.head.nbytes
        self.embed: Callable[[Tensor], Tensor] = base.transformer.word_embeddings


class ResidentWeights(NonBlockWeights):
    """All layers in the memory of one device, too."""

    def __init__(self, base: PreTrainedModel, compute_dtype: torch.dtype):
        super().__init__(base, compute_dtype)
        self._layers = [layer_of(block) for block in base.transformer.h]

    def through(self, order: Sequence[int]) -> Iterator[BlockWeights]:
        return (self._layers[i] for i in order)


def layer_of(block: Any) -> BlockWeights:
    """The weights of a block of transformers' BLOOM, not copies of them."""
    return BlockWeights(*(_affine(block.get_submodule(module)) for module in MODULES))


def is_bloom(config: Any) -> bool:
    """Whether this is the forward that is written here: BLOOM, without its option to add up slices of two projections,
    which leaves their biases out."""
    sliced = getattr(config, "slow_but_exact", False) and config.pretraining_tp > 1
    return config.model_type == "bloom" and not sliced


def bloom_shape(config: Any) -> Shape:
    """The sizes of a transformers BloomConfig."""
    L, N, H = config.num_hidden_layers, config.num_attention_heads, config.hidden_size
    after = config.apply_residual_connection_post_layernorm
    return Shape(L, N, H // N, H, config.vocab_size, config.layer_norm_epsilon, after)


def _affine(module: Any) -> LinearParams:
    return LinearParams(module.weight.detach(), module.bias.detach())
