"""The exact fast forward over frozen BLOOM: packed rows behind a prompt that is run once.

Causality makes the virtual tokens' states independent of the text after them, so one pass over the prompt serves every
row of a window: its keys and values stand before each row's own, and the gradients that rows leave on them flow back
through the prompt in one pass. Rows lie one after the other without padding; final layer norm, the last block's queries
and MLP, and the vocabulary see only positions whose next token is a target.

Matrix products run in the compute dtype; residual stream, layer norms and loss in the wide dtype (fp32, or fp64 under
fp64), and on the CPU attention too.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from softprompt.data.collate import Packed
from softprompt.engines.linear_cross_entropy import projected_cross_entropy
from softprompt.engines.prefix_attention import Group, attend, causal_alibi, group_rows
from softprompt.engines.small_linear import project
from softprompt.models.bloom_weights import BlockWeights, LinearParams, Shape, Weights

BlockAttention = Callable[[Tensor, Tensor], Tensor]  # q [S, N, D], keys and values [S, N, 2, D] → [S, N·D]
Attention = Callable[[int, Tensor, Tensor], Tensor]  # the same of a layer, whose number comes first


class Prefix(NamedTuple):
    """What rows see of the prompt: each layer's keys and values [P, N, 2, D], and the last virtual token's output
    [1, H] (wide), which predicts a row's first token; [0, H] without a prompt."""

    layers: list[Tensor]
    last: Tensor


class Predictions(NamedTuple):
    """What predicts the targets of a micro-batch: final states [f + n, H], the head [V, H], both in the compute dtype,
    and the targets [f + n] int64: the rows' first tokens, where they are targets and there is a prompt to predict them,
    then those behind its `predictors`."""

    hidden: Tensor
    head: Tensor
    targets: Tensor


def norm(x: Tensor, affine: LinearParams, epsilon: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], affine.weight, affine.bias, epsilon)


def linear(x: Tensor, affine: LinearParams) -> Tensor:
    """[S, in] → [S, out] in the weight's dtype."""
    return project(x.to(affine.weight.dtype), affine.weight, affine.bias.to(affine.weight.dtype))


def heads(x: Tensor, parts: int, shape: Shape) -> Tensor:
    """[S, N·parts·D] → [S, N, parts, D], in fp32 on the CPU, whose attention is slow in less."""
    dtype = torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype
    return x.to(dtype).reshape(-1, shape.N, parts, shape.D)


def queries_and_pairs(y: Tensor, affine: LinearParams, shape: Shape) -> list[Tensor]:
    """[S, H] → queries [S, N, 1, D], keys and values [S, N, 2, D]."""
    return list(heads(linear(y, affine), 3, shape).split([1, 2], dim=2))


def finish_block(x: Tensor, y: Tensor, attended: Tensor, layer: BlockWeights, shape: Shape) -> Tensor:
    """What follows attention: residual x [S, H] (or its layer norm y), attended [S, N·D] → [S, H]."""
    x = (y if shape.residual_after_layernorm else x) + linear(attended, layer.dense)
    y = norm(x, layer.post_attention_layernorm, shape.epsilon)
    wide = F.gelu(linear(y, layer.dense_h_to_4h), approximate="tanh")  # [S, 4H]
    return (y if shape.residual_after_layernorm else x) + linear(wide, layer.dense_4h_to_h)


def run_block(
    layer: BlockWeights, x: Tensor, attention: BlockAttention, shape: Shape, predictors: Tensor | None = None
) -> Tensor:
    """The residual stream [S, H] through one block; where `predictors` [n] int64 are given, it goes on with those
    positions alone: [n, H]."""
    y = norm(x, layer.input_layernorm, shape.epsilon)
    if predictors is None:
        q, kv = queries_and_pairs(y, layer.query_key_value, shape)  # [S, N, 1, D], [S, N, 2, D]
        return finish_block(x, y, attention(q[:, :, 0], kv), layer, shape)
    of_q, of_kv = split_projection(layer.query_key_value, shape)
    kv = heads(linear(y, of_kv), 2, shape)  # [S, N, 2, D]
    x, y = x.index_select(0, predictors), y.index_select(0, predictors)  # [n, H]
    q = heads(linear(y, of_q), 1, shape)[:, :, 0]  # [n, N, D]
    q = torch.zeros_like(kv[:, :, 0]).index_copy(0, predictors, q)  # [S, N, D]
    return finish_block(x, y, attention(q, kv).index_select(0, predictors), layer, shape)


def run_blocks(
    weights: Weights, x: Tensor, attention: Attention, predictors: Tensor | None = None, recompute: bool = False
) -> Tensor:
    """The residual stream [S, H] through all blocks, the last one with `predictors`, as of `run_block`. `recompute`
    keeps only the blocks' inputs for the backward pass (Chen et al. 2016, arXiv:1604.06174)."""
    shape = weights.shape
    for i, layer in enumerate(weights.through(range(shape.L))):
        at = predictors if i == shape.L - 1 else None
        block = partial(run_block, layer, attention=partial(attention, i), shape=shape, predictors=at)
        x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
    return x


def run_prompt_block(layer: BlockWeights, x: Tensor, bias: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """The virtual tokens [P, H] through one block, by themselves: [P, H], and their keys and values [P, N, 2, D];
    bias [1, N, P, P]."""
    P, pairs = len(x), list[Tensor]()

    def attention(q: Tensor, kv: Tensor) -> Tensor:
        pairs.append(kv)
        return attend(q, kv, kv[:0], bias.to(q.dtype), [Group(1, P, P, None, None)]) if P else q.flatten(1)

    return run_block(layer, x, attention, shape), pairs[0]


def run_prompt(weights: Weights, prompt: Tensor) -> Prefix:
    """The virtual tokens [P, H] through all layers, by themselves; P = 0 is no prompt."""
    shape, layers = weights.shape, list[Tensor]()
    x = norm(prompt, weights.embedding_layernorm, shape.epsilon)  # [P, H]
    bias = causal_alibi(shape.N, len(x), 0, x)
    for layer in weights.through(range(shape.L)):
        x, kv = run_prompt_block(layer, x, bias, shape)
        layers.append(kv)
    return Prefix(layers, x[-1:])


def run_rows(weights: Weights, prefix: Prefix, batch: Packed, recompute: bool = False) -> Tensor:
    """Summed loss of a micro-batch behind the prompt, a scalar."""
    return projected_cross_entropy(*predictions(weights, prefix, batch, recompute))


def predictions(weights: Weights, prefix: Prefix, batch: Packed, recompute: bool = False) -> Predictions:
    """What predicts the targets of a micro-batch behind the prompt."""
    shape, P = weights.shape, len(prefix.layers[0])
    x = embed(weights, batch)  # [S, H]
    if batch.lengths:
        bias = causal_alibi(shape.N, max(batch.lengths), P, x).to(prefix.layers[0].dtype)
        groups = group_rows(batch.lengths, x.device)

        def attention(i: int, q: Tensor, kv: Tensor) -> Tensor:
            return attend(q, kv, prefix.layers[i], bias, groups)

        x = run_blocks(weights, x, attention, batch.predictors, recompute)  # [n, H]
    return final_hidden(weights, prefix.last, batch, x)


def embed(weights: Weights, batch: Packed) -> Tensor:
    """What a micro-batch's tokens are before the first block: [S, H]."""
    return norm(weights.embed(batch.input_ids), weights.embedding_layernorm, weights.shape.epsilon)


def final_hidden(weights: Weights, last: Tensor, batch: Packed, x: Tensor) -> Predictions:
    """From the last block's outputs, x [n, H] at the predictors of a micro-batch and `last` of a `Prefix`."""
    first = batch.first_targets if len(last) else batch.first_targets[:0]  # [f]: without a prompt nothing predicts them
    x = torch.cat([last.expand(len(first), -1) if len(last) else x[:0], x])  # [f + n, H]
    hidden = norm(x, weights.final_layernorm, weights.shape.epsilon).to(weights.head.dtype)
    return Predictions(hidden, weights.head, torch.cat([first, batch.targets]))


def split_projection(affine: LinearParams, shape: Shape) -> tuple[LinearParams, LinearParams]:
    """The projection to [N, 3, D] as one to queries [N, 1, D] and one to keys and values [N, 2, D]."""
    weight, bias = (t.unflatten(0, (shape.N, 3, shape.D)) for t in affine)
    of_q, of_kv = (LinearParams(weight[:, s].flatten(0, 2), bias[:, s].flatten()) for s in (slice(0, 1), slice(1, 3)))
    return of_q, of_kv
