"""BLOOM's frozen weights, block by block.

The packed engine's schedules for BLOOM and BLOOM's generator iterate over the blocks through `BloomWeights`, whatever
the storage:
`ResidentWeights` holds all blocks on one device, `StreamedWeights` (weight_offload) reads them from files,
`ShardedWeights` (fsdp) gathers them from all ranks, and `DequantizedWeights` dequantizes them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt.models.bitsandbytes_linear import dequantize, has_bitsandbytes_weight, quantized_bytes
from softprompt.models.quantization import holds_quantized, is_quantized


class LinearParams(NamedTuple):
    """The parameters of a linear layer (weight [out, in] in the compute dtype, bias [out] fp32), or of a layer norm
    (scale and shift, [H] fp32 each)."""

    weight: Tensor
    bias: Tensor


class BlockWeights(NamedTuple):
    """The parameters of one block. The 3·H outputs of `query_key_value` are laid out as [N, 3, D]."""

    input_layernorm: LinearParams  # [H]
    query_key_value: LinearParams  # [3H, H]
    dense: LinearParams  # [H, H]
    post_attention_layernorm: LinearParams  # [H]
    dense_h_to_4h: LinearParams  # [4H, H]
    dense_4h_to_h: LinearParams  # [H, 4H]


BLOCK_MODULES = (  # names in a block of transformers' BLOOM, in the order of the fields of BlockWeights
    *("input_layernorm", "self_attention.query_key_value", "self_attention.dense"),
    *("post_attention_layernorm", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
)
LINEAR_MODULES = tuple(name for name in BLOCK_MODULES if not name.endswith("layernorm"))


class BloomShape(NamedTuple):
    """A BLOOM's sizes: L layers, N attention heads of size D, hidden size H, vocabulary V; and the two settings that
    its forward depends on."""

    L: int
    N: int
    D: int
    H: int
    V: int
    epsilon: float
    residual_after_layernorm: bool


class BloomWeights(Protocol):
    """The weights that this project's forward of BLOOM needs. The blocks may be stored anywhere; all other weights are
    on the compute device.

    Attributes:
        shape: The base's sizes.
        embedding_layernorm: The layer norm that BLOOM applies to its input embeddings, [H].
        final_layernorm: The layer norm before the head, [H].
        head: The language model head, [V, H] in the compute dtype.
        extra_bytes: Memory that this object takes in addition to the base's own tensors.
    """

    shape: BloomShape
    embedding_layernorm: LinearParams
    final_layernorm: LinearParams
    head: Tensor
    extra_bytes: int

    def embed(self, ids: Tensor) -> Tensor:
        """Return the word embeddings before their layer norm: ids [...] int64 → [..., H] fp32."""
        ...

    def iter_layers(self, order: Sequence[int]) -> Iterator[BlockWeights]:
        """Yield the blocks with these indices, in this order.

        Buffers may be reused: a yielded block is valid only until the next one is requested."""
        ...


class NonBlockWeights:
    """The part of `BloomWeights` that is on the device wherever the blocks are: everything except the blocks.

    These are the base's own tensors, not copies, with one exception: a tied head is copied if the compute dtype differs
    from the dtype of the embeddings.
    """

    def __init__(self, base: PreTrainedModel, compute_dtype: torch.dtype):
        self.shape = bloom_shape(base.config)
        self.embedding_layernorm = linear_params(base.transformer.word_embeddings_layernorm)
        self.final_layernorm = linear_params(base.transformer.ln_f)
        head = base.get_output_embeddings().weight.detach()
        self.head: Tensor = head.to(compute_dtype)
        self.extra_bytes = 0 if self.head is head else self.head.nbytes
        self.embed: Callable[[Tensor], Tensor] = base.transformer.word_embeddings


class ResidentWeights(NonBlockWeights):
    """All blocks in the memory of one device: the base's own tensors."""

    def __init__(self, base: PreTrainedModel, compute_dtype: torch.dtype):
        super().__init__(base, compute_dtype)
        self._blocks = [block_weights(block) for block in base.transformer.h]

    def iter_layers(self, order: Sequence[int]) -> Iterator[BlockWeights]:
        return (self._blocks[i] for i in order)


class DequantizedWeights(NonBlockWeights):
    """All blocks in the memory of one device, their linear layers in bitsandbytes' 8-bit or 4-bit format. A block is
    dequantized when it is requested."""

    def __init__(self, base: PreTrainedModel, compute_dtype: torch.dtype):
        super().__init__(base, compute_dtype)
        self._blocks, self._dtype = base.transformer.h, compute_dtype
        self.extra_bytes += 2 * self.block_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of the linear layers of one block in the compute dtype."""
        return self._dtype.itemsize * 12 * self.shape.H**2

    @property
    def held_blocks(self) -> int:
        """The memory of the quantized linear layers, as a number of blocks in the compute dtype, rounded up."""
        linear = [m for block in self._blocks for m in block.modules() if has_bitsandbytes_weight(m)]
        return math.ceil(sum(map(quantized_bytes, linear)) / self.block_bytes)

    def iter_layers(self, order: Sequence[int]) -> Iterator[BlockWeights]:
        return (BlockWeights(*map(self._linear_params, self._modules(i))) for i in order)

    def _modules(self, i: int) -> Iterator[Any]:
        return (self._blocks[i].get_submodule(name) for name in BLOCK_MODULES)

    def _linear_params(self, module: Any) -> LinearParams:
        params = linear_params(module)
        return params._replace(weight=dequantize(module, self._dtype)) if has_bitsandbytes_weight(module) else params


def has_readable_blocks(base: PreTrainedModel) -> bool:
    """Whether `base` is a BLOOM (see `is_bloom`) whose linear layers are unquantized or in bitsandbytes' formats."""
    if not is_bloom(base.config) or not is_quantized(base):
        return is_bloom(base.config)
    linear = [block.get_submodule(name) for block in base.transformer.h for name in LINEAR_MODULES]
    return all(has_bitsandbytes_weight(m) or (isinstance(m, nn.Linear) and not holds_quantized(m)) for m in linear)


def resident_weights(base: PreTrainedModel, compute_dtype: torch.dtype) -> "ResidentWeights | DequantizedWeights":
    """Return the weights of a BLOOM that is in the memory of one device as a whole."""
    return (DequantizedWeights if is_quantized(base) else ResidentWeights)(base, compute_dtype)


def block_weights(block: Any) -> BlockWeights:
    """Return the parameters of a block of transformers' BLOOM; they are not copied."""
    return BlockWeights(*(linear_params(block.get_submodule(module)) for module in BLOCK_MODULES))


def linear_params(module: Any) -> LinearParams:
    """Return the weight and bias of a linear layer or a layer norm; they are not copied."""
    return LinearParams(module.weight.detach(), module.bias.detach())


def is_bloom(config: Any) -> bool:
    """Whether this project's forward of BLOOM (`engines.bloom`) computes what a base of this configuration computes.
    The base must be a BLOOM that does not compute two projections as sums over slices (`slow_but_exact` with
    `pretraining_tp` > 1), since transformers leaves out their biases then."""
    sliced = getattr(config, "slow_but_exact", False) and config.pretraining_tp > 1
    return config.model_type == "bloom" and not sliced


def bloom_shape(config: Any) -> BloomShape:
    """Return the sizes of a transformers BloomConfig."""
    L, N, H = config.num_hidden_layers, config.num_attention_heads, config.hidden_size
    after_layernorm = config.apply_residual_connection_post_layernorm
    return BloomShape(L, N, H // N, H, config.vocab_size, config.layer_norm_epsilon, after_layernorm)
