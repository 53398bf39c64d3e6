"""Prefix attention: each packed row attends causally, with ALiBi, to the prompt's keys and values and to its own.

The packed rows [S, …] have different lengths, but attention needs tensors [B, T, …]. So consecutive rows of equal
length (on CUDA, of similar length) form a group, which one call computes; rows are padded only within a group. The
prompt's keys and values are the same for all rows. `attend` is for BLOOM; `decoder_attention` uses the same groups.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from softprompt.utils.transfer import to_device


class RowGroup(NamedTuple):
    """Consecutive packed rows that one call of attention computes.

    Attributes:
        rows: Number of rows, B.
        width: Number of tokens of the longest row, T.
        tokens: Number of tokens of all rows.
        pad_index: [B·T] int64, the index of the group's token at each place of the padded rows; padding, on the right,
            repeats a row's last token. None if all rows have the same length.
        unpad_index: [tokens] int64, the place of each token in the padded rows; None if all rows have the same length.
    """

    rows: int
    width: int
    tokens: int
    pad_index: Tensor | None
    unpad_index: Tensor | None


def alibi_slopes(n_heads: int) -> list[float]:
    """Return ALiBi's slope of each of n heads (Press et al. 2022, arXiv:2108.12409): 2^(-8i/n) for i = 1 … n. If n is
    not a power of two, these are the slopes of the next lower power of two, followed by every other slope of the next
    higher one."""
    below = 2 ** int(math.log2(n_heads))
    slopes = [2 ** (-8 * i / below) for i in range(1, below + 1)]
    return slopes + [2 ** (-4 * i / below) for i in range(1, 2 * (n_heads - below), 2)]


def causal_alibi(n_heads: int, width: int, P: int, like: Tensor) -> Tensor:
    """Return the bias to add to the attention scores of a row behind a prompt: ALiBi and the causal mask.

    Args:
        width: W, the number of tokens of the longest row. A shorter row uses the first rows and columns of the result.
        like: A tensor with the dtype and device of the result.
    Returns:
        [1, N, W, P + W]: -slope · distance for the P keys of the prompt and then for the row's own W keys; -inf for
        keys later than the query.
    """
    slopes = to_device(torch.tensor(alibi_slopes(n_heads), dtype=like.dtype), like.device)  # [N]
    query = torch.arange(P, P + width, device=like.device)[:, None]  # [width, 1]
    distance = torch.arange(P + width, device=like.device) - query  # [width, P + width]
    bias = slopes[:, None, None] * distance  # [N, width, P + width]
    return bias.masked_fill_(distance > 0, -math.inf)[None]


def group_rows(lengths: Sequence[int], device: torch.device) -> list[RowGroup]:
    """Group rows for `attend`; `lengths` must be in descending order.

    On the CPU the rows of a group have equal length, so nothing is padded. On CUDA each call costs time, so a row joins
    a group if it has at least three quarters of the length of the group's first row.
    """
    least = 1.0 if device.type == "cpu" else 0.75
    runs: list[list[int]] = []
    for length in lengths:
        if not runs or not least * runs[-1][0] <= length <= runs[-1][0]:
            runs.append([])
        runs[-1].append(length)
    return [_group(run, device) for run in runs]


def _group(lengths: Sequence[int], device: torch.device) -> RowGroup:
    rows, width, tokens = len(lengths), max(lengths), sum(lengths)
    if rows * width == tokens:
        return RowGroup(rows, width, tokens, None, None)
    length = torch.tensor(lengths)[:, None]  # [B, 1]
    start = length.cumsum(0) - length
    column = torch.arange(width)  # [width]
    pad_index = (start + column.clamp(max=length - 1)).flatten()
    unpad_index = (column < length).flatten().nonzero()[:, 0]
    return RowGroup(rows, width, tokens, to_device(pad_index, device), to_device(unpad_index, device))


def attend(q: Tensor, kv: Tensor, prefix_kv: Tensor, bias: Tensor, groups: list[RowGroup]) -> Tensor:
    """Compute the attention of each row to the prompt and to itself.

    Args:
        q: Queries [S, N, D].
        kv: Keys and values [S, N, 2, D].
        prefix_kv: The prompt's keys and values [P, N, 2, D].
        bias: [1, N, W, P + W] for W at least the longest row, from `causal_alibi`.
        groups: The groups of rows, from `group_rows`.
    Returns:
        [S, N·D] in the dtype of `q`.
    """
    sizes, P = [group.tokens for group in groups], len(prefix_kv)
    outputs = []
    for group, queries, pairs in zip(groups, q.split(sizes), kv.split(sizes), strict=True):
        query = as_rows(queries, group).transpose(1, 2)  # [B, N, T, D]
        prompt = prefix_kv.to(kv.dtype).expand(group.rows, -1, -1, -1, -1)
        pair = torch.cat([prompt, as_rows(pairs, group)], dim=1).transpose(1, 2)  # [B, N, P + T, 2, D]
        mask = bias[:, :, : group.width, : P + group.width]
        out = F.scaled_dot_product_attention(query, *pair.unbind(3), attn_mask=mask)  # [B, N, T, D]
        out = out.transpose(1, 2).flatten(2).flatten(0, 1)  # [B·T, N·D]
        outputs.append(out if group.unpad_index is None else out.index_select(0, group.unpad_index))
    return torch.cat(outputs)


def as_rows(x: Tensor, group: RowGroup) -> Tensor:
    """Convert a group's tokens [tokens, …] to padded rows [B, T, …]."""
    x = x if group.pad_index is None else x.index_select(0, group.pad_index)
    return x.unflatten(0, (group.rows, group.width))
