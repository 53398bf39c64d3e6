"""An exact and fast forward pass of frozen BLOOM, for packed rows behind a soft prompt.

These are the phases of `prefix_schedule`. Only the n positions whose next token is a target go through the last block's
queries and MLP, the final layer norm and the head.

Matrix products run in the compute dtype. The residual stream, the layer norms and the loss are in the wide dtype (fp32,
or fp64 if the compute dtype is fp64); on the CPU, attention is, too.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from softprompt.data.collate import Packed
from softprompt.engines.microbatch_engine import LossInputs
from softprompt.engines.prefix_attention import RowGroup, attend, causal_alibi, group_rows
from softprompt.engines.prefix_schedule import PrefixKV
from softprompt.models.bloom_weights import BlockWeights, BloomShape, BloomWeights, LinearParams

BlockAttention = Callable[[Tensor, Tensor], Tensor]  # queries [S, N, D], keys and values [S, N, 2, D] → [S, N·D]
Attention = Callable[[int, Tensor, Tensor], Tensor]  # the same, with the layer's index as the first argument
LinearFn = Callable[[Tensor, Tensor, Tensor], Tensor]  # x [S, in], weight [out, in], bias [out] → [S, out]


# Phase 1: the prompt, once per window.


def run_prompt(weights: BloomWeights, prompt: Tensor) -> PrefixKV:
    """Run the virtual tokens [P, H] through all blocks by themselves; P = 0 means no prompt. The layers of the result
    are the keys and values [P, N, 2, D] of each block, and its last hidden state is the last block's output (wide)."""
    shape, layers = weights.shape, list[Tensor]()
    x = embed_prompt(weights, prompt)  # [P, H]
    bias = causal_alibi(shape.N, len(x), 0, x)
    for block in weights.iter_layers(range(shape.L)):
        x, kv = run_prompt_block(block, x, bias, shape)
        layers.append(kv)
    return PrefixKV(layers, x[-1:])


def embed_prompt(weights: BloomWeights, prompt: Tensor) -> Tensor:
    """Apply the layer norm of input embeddings, which BLOOM applies to virtual tokens as well: [P, H] → [P, H]."""
    return layer_norm(prompt, weights.embedding_layernorm, weights.shape.epsilon)


def run_prompt_block(block: BlockWeights, x: Tensor, bias: Tensor, shape: BloomShape) -> tuple[Tensor, Tensor]:
    """Run the virtual tokens through one block by themselves.

    Args:
        x: The residual stream [P, H].
        bias: ALiBi and causal mask [1, N, P, P], from `causal_alibi`.
    Returns:
        The residual stream after the block [P, H], and the block's keys and values [P, N, 2, D].
    """
    P, computed = len(x), list[Tensor]()

    def attention(q: Tensor, kv: Tensor) -> Tensor:
        computed.append(kv)
        return attend(q, kv, kv[:0], bias.to(q.dtype), [RowGroup(1, P, P, None, None)]) if P else q.flatten(1)

    return run_block(block, x, attention, shape), computed[0]


# Phase 2: the rows, once per micro-batch.


def rows_forward(weights: BloomWeights, prefix: PrefixKV, batch: Packed, recompute: bool = False) -> LossInputs:
    """Run a micro-batch behind the prompt up to the head; `recompute` as in `run_blocks`."""
    shape, P = weights.shape, len(prefix.layers[0])
    x = embed_rows(weights, batch)  # [S, H]
    if batch.lengths:
        bias = causal_alibi(shape.N, max(batch.lengths), P, x).to(prefix.layers[0].dtype)
        groups = group_rows(batch.lengths, x.device)

        def attention(i: int, q: Tensor, kv: Tensor) -> Tensor:
            return attend(q, kv, prefix.layers[i], bias, groups)

        x = run_blocks(weights, x, attention, batch.predictors, recompute=recompute)  # [n, H]
    return loss_inputs(weights, prefix.last_hidden, batch, x)


def embed_rows(weights: BloomWeights, batch: Packed) -> Tensor:
    """Return the residual stream of a micro-batch before the first block: [S, H]."""
    return layer_norm(weights.embed(batch.input_ids), weights.embedding_layernorm, weights.shape.epsilon)


def loss_inputs(weights: BloomWeights, last_hidden: Tensor, batch: Packed, x: Tensor) -> LossInputs:
    """Apply the final layer norm to the positions that predict targets.

    Args:
        last_hidden: As in `PrefixKV`, [1, H] or [0, H].
        x: The last block's output at the micro-batch's predictors [n, H].
    """
    first = batch.first_targets if len(last_hidden) else batch.first_targets[:0]  # [f]
    x = torch.cat([last_hidden.expand(len(first), -1) if len(last_hidden) else x[:0], x])  # [f + n, H]
    hidden = layer_norm(x, weights.final_layernorm, weights.shape.epsilon).to(weights.head.dtype)
    return LossInputs(hidden, torch.cat([first, batch.targets]))


# Blocks, as both phases and the generator run them.


def run_blocks(
    weights: BloomWeights,
    x: Tensor,
    attention: Attention,
    predictors: Tensor | None = None,
    *,
    recompute: bool = False,
    linear: LinearFn = F.linear,
) -> Tensor:
    """Run the residual stream through all blocks.

    Args:
        x: [S, H].
        attention: Computes attention, given the layer's index, queries, and keys and values.
        predictors: Positions [n] int64 whose output is needed; the last block computes only these.
        recompute: Keep only the blocks' inputs for the backward pass, and recompute the rest there (Chen et al. 2016,
            arXiv:1604.06174).
        linear: Computes linear layers.
    Returns:
        [S, H], or [n, H] with `predictors`.
    """
    shape = weights.shape
    for i, block in enumerate(weights.iter_layers(range(shape.L))):
        at = predictors if i == shape.L - 1 else None
        run = partial(run_block, block, attention=partial(attention, i), shape=shape, predictors=at, linear=linear)
        x = checkpoint(run, x, use_reentrant=False) if recompute else run(x)
    return x


def run_block(
    block: BlockWeights,
    x: Tensor,
    attention: BlockAttention,
    shape: BloomShape,
    predictors: Tensor | None = None,
    linear: LinearFn = F.linear,
) -> Tensor:
    """Run the residual stream [S, H] through one block and return [S, H]. With `predictors` [n] int64, queries, output
    projection and MLP are computed only at these positions, and the result is [n, H]."""
    y = layer_norm(x, block.input_layernorm, shape.epsilon)
    if predictors is None:
        qkv = split_heads(apply_linear(y, block.query_key_value, linear), 3, shape)  # [S, N, 3, D]
        q, kv = qkv.split([1, 2], dim=2)  # [S, N, 1, D], [S, N, 2, D]
        return finish_block(block, x, y, attention(q[:, :, 0], kv), shape, linear)
    q_params, kv_params = split_projection(block.query_key_value, shape)
    kv = split_heads(apply_linear(y, kv_params, linear), 2, shape)  # [S, N, 2, D]
    x, y = x.index_select(0, predictors), y.index_select(0, predictors)  # [n, H]
    q = split_heads(apply_linear(y, q_params, linear), 1, shape)[:, :, 0]  # [n, N, D]
    q = torch.zeros_like(kv[:, :, 0]).index_copy(0, predictors, q)  # [S, N, D]
    return finish_block(block, x, y, attention(q, kv).index_select(0, predictors), shape, linear)


def finish_block(
    block: BlockWeights, x: Tensor, y: Tensor, attended: Tensor, shape: BloomShape, linear: LinearFn
) -> Tensor:
    """Compute what follows attention in a block: output projection, residual, MLP, residual.

    Args:
        x: The block's input [S, H].
        y: Its layer norm [S, H], which is the residual if `shape.residual_after_layernorm`.
        attended: The output of attention [S, N·D].
    Returns:
        The block's output [S, H].
    """
    x = (y if shape.residual_after_layernorm else x) + apply_linear(attended, block.dense, linear)
    y = layer_norm(x, block.post_attention_layernorm, shape.epsilon)
    hidden = F.gelu(apply_linear(y, block.dense_h_to_4h, linear), approximate="tanh")  # [S, 4H]
    return (y if shape.residual_after_layernorm else x) + apply_linear(hidden, block.dense_4h_to_h, linear)


def layer_norm(x: Tensor, params: LinearParams, epsilon: float) -> Tensor:
    """Apply a layer norm: […, H] → […, H]."""
    return F.layer_norm(x, x.shape[-1:], params.weight, params.bias, epsilon)


def apply_linear(x: Tensor, params: LinearParams, linear: LinearFn) -> Tensor:
    """Cast x [S, in] to the weight's dtype and apply the linear layer: [S, out] in that dtype."""
    return linear(x.to(params.weight.dtype), params.weight, params.bias.to(params.weight.dtype))


def split_heads(x: Tensor, parts: int, shape: BloomShape) -> Tensor:
    """Split a projection into heads: [S, N·parts·D] → [S, N, parts, D]. On the CPU, where attention in narrower dtypes
    is slow, the result is at least fp32."""
    dtype = torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype
    return x.to(dtype).reshape(-1, shape.N, parts, shape.D)


def split_projection(params: LinearParams, shape: BloomShape) -> tuple[LinearParams, LinearParams]:
    """Split the projection to [N, 3, D] into one to the queries [N, 1, D] and one to the keys and values [N, 2, D]."""
    weight, bias = (t.unflatten(0, (shape.N, 3, shape.D)) for t in params)
    q, kv = (LinearParams(weight[:, s].flatten(0, 2), bias[:, s].flatten()) for s in (slice(0, 1), slice(1, 3)))
    return q, kv
