"""An exact and fast forward pass of frozen BLOOM, for packed rows behind a soft prompt.

The functions compute phases 1 and 2 of `prefix_schedule`. The last block computes queries, output projection and MLP
only at the n positions whose next token is a target; so do the final layer norm and the head.

Matrix products run in the compute dtype. The residual stream, the layer norms and the loss are in the wide dtype (fp32,
or fp64 if the compute dtype is fp64). On the CPU, attention is also in the wide dtype.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from softprompt.data.collate import Packed
from softprompt.engines.flex_attention import FlexStream
from softprompt.engines.microbatch_engine import LossInputs
from softprompt.engines.prefix_attention import RowGroup, alibi_slopes, attend, causal_alibi, group_rows
from softprompt.engines.prefix_schedule import PrefixKV
from softprompt.models.bloom_weights import BlockWeights, BloomShape, BloomWeights, LinearParams
from softprompt.utils.transfer import to_device

BlockAttention = Callable[[Tensor, Tensor], Tensor]  # queries [S, N, D], keys and values [S, N, 2, D] → [S, N·D]
Attention = Callable[[int, Tensor, Tensor], Tensor]  # the same, with the layer's index as the first argument
LinearFn = Callable[[Tensor, Tensor, Tensor], Tensor]  # x [S, in], weight [out, in], bias [out] → [S, out]


# Phase 1: the prompt, once per window.


def run_prompt(weights: BloomWeights, prompt: Tensor) -> PrefixKV:
    """Run the virtual tokens [P, H] through all blocks, without text; P = 0 means no prompt.

    Returns:
        Layers: the keys and values [P, N, 2, D] of each block. Last hidden state: the last block's output for the last
        virtual token, in the wide dtype and before the final layer norm.
    """
    shape, layers = weights.shape, list[Tensor]()
    x = embed_prompt(weights, prompt)  # [P, H]
    bias = causal_alibi(shape.N, len(x), 0, x)
    for block in weights.iter_layers(range(shape.L)):
        x, kv = run_prompt_block(block, x, bias, shape)
        layers.append(kv)
    return PrefixKV(layers, x[-1:])


def embed_prompt(weights: BloomWeights, prompt: Tensor) -> Tensor:
    """Apply BLOOM's layer norm of input embeddings to the virtual tokens: [P, H] → [P, H]."""
    return layer_norm(prompt, weights.embedding_layernorm, weights.shape.epsilon)


def run_prompt_block(block: BlockWeights, x: Tensor, bias: Tensor, shape: BloomShape) -> tuple[Tensor, Tensor]:
    """Run the virtual tokens through one block, without text.

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


def rows_forward(
    weights: BloomWeights, prefix: PrefixKV, batch: Packed, recompute: bool = False, attn_implementation: str = "sdpa"
) -> LossInputs:
    """Run a micro-batch behind the prompt, up to the input of the head. For `recompute` see `run_blocks`, for
    `attn_implementation` see `row_attention`."""
    x = embed_rows(weights, batch)  # [S, H]
    if batch.lengths:
        attention = row_attention(weights.shape, prefix, batch.lengths, x, attn_implementation)
        x = run_blocks(weights, x, attention, batch.predictors, recompute=recompute)  # [n, H]
    return loss_inputs(weights, prefix.last_hidden, batch, x)


def row_attention(
    shape: BloomShape, prefix: PrefixKV, lengths: list[int], like: Tensor, attn_implementation: str
) -> Attention:
    """Return the attention of packed rows behind a prompt.

    Args:
        lengths: Number of tokens of each row.
        like: A tensor with the device and the wide dtype.
        attn_implementation: "sdpa", or "flex_attention" (see `FlexStream`).
    """
    P = len(prefix.layers[0])
    if attn_implementation == "flex_attention":
        stream = FlexStream(lengths, like.device, P)
        slopes = torch.tensor(alibi_slopes(shape.N), dtype=torch.float32)
        with_alibi = stream.alibi(to_device(slopes, like.device))

        def flex(i: int, q: Tensor, kv: Tensor) -> Tensor:
            keys, values = torch.cat([prefix.layers[i].to(kv.dtype), kv]).unbind(2)  # [P + S, N, D]
            return stream.attend(q, keys, values, with_alibi).flatten(1)

        return flex
    bias = causal_alibi(shape.N, max(lengths), P, like).to(prefix.layers[0].dtype)
    groups = group_rows(lengths, like.device)

    def attention(i: int, q: Tensor, kv: Tensor) -> Tensor:
        return attend(q, kv, prefix.layers[i], bias, groups)

    return attention


def embed_rows(weights: BloomWeights, batch: Packed) -> Tensor:
    """Return the first block's input for the S tokens of a micro-batch: [S, H]."""
    return layer_norm(weights.embed(batch.input_ids), weights.embedding_layernorm, weights.shape.epsilon)


def loss_inputs(weights: BloomWeights, last_hidden: Tensor, batch: Packed, x: Tensor) -> LossInputs:
    """Apply the final layer norm to the hidden states that predict targets, and pair them with the targets.

    Args:
        last_hidden: As in `PrefixKV`, [1, H] or [0, H].
        x: The last block's output at the micro-batch's predictors [n, H].
    """
    first = batch.first_targets if len(last_hidden) else batch.first_targets[:0]  # [f]
    x = torch.cat([last_hidden.expand(len(first), -1) if len(last_hidden) else x[:0], x])  # [f + n, H]
    hidden = layer_norm(x, weights.final_layernorm, weights.shape.epsilon).to(weights.head.dtype)
    return LossInputs(hidden, torch.cat([first, batch.targets]))


# Blocks: used by both phases and by the generator.


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
        predictors: Indices [n] int64 of the tokens whose output is needed; the last block returns only these. None
            means all.
        recompute: Gradient checkpointing (Chen et al. 2016, arXiv:1604.06174): keep only the blocks' inputs, and
            recompute the other activations in the backward pass.
        linear: Function that computes linear layers.
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
    """Run the residual stream [S, H] through one block and return [S, H]. With `predictors` [n] int64, compute queries,
    output projection and MLP only at these indices, and return [n, H]."""
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
    """Compute the part of a block after attention: output projection, residual connection, MLP, residual connection.

    Args:
        x: The block's input [S, H].
        y: The layer norm of x [S, H]. If `shape.residual_after_layernorm`, y is added to the output projection instead
            of x.
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
    """Split a projection into heads: [S, N·parts·D] → [S, N, parts, D]. On the CPU, the result is at least fp32,
    because attention in narrower dtypes is slow there."""
    dtype = torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype
    return x.to(dtype).reshape(-1, shape.N, parts, shape.D)


def split_projection(params: LinearParams, shape: BloomShape) -> tuple[LinearParams, LinearParams]:
    """Split the projection of queries, keys and values (output [N, 3, D]) into that of the queries ([N, 1, D]) and that
    of the keys and values ([N, 2, D])."""
    weight, bias = (t.unflatten(0, (shape.N, 3, shape.D)) for t in params)
    q, kv = (LinearParams(weight[:, s].flatten(0, 2), bias[:, s].flatten()) for s in (slice(0, 1), slice(1, 3)))
    return q, kv
