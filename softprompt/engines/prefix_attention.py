"""Causal attention with ALiBi of packed rows over the prompt's keys and values and their own."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Group(NamedTuple):
    """B consecutive rows of the stream that attention takes at once, `width` tokens wide. `take` [B·width] and `drop`
    [their tokens] int64 pad them on the right and undo that; None where all are equally long."""

    rows: int
    width: int
    tokens: int
    take: Tensor | None
    drop: Tensor | None


def alibi_slopes(n_heads: int) -> list[float]:
    """Press et al. 2022, arXiv:2108.12409: 2^(-8i/n) for i = 1 … n; where n is no power of two, those of the power
    below, then every other one of the power above."""
    below = 2 ** int(math.log2(n_heads))
    slopes = [2 ** (-8 * i / below) for i in range(1, below + 1)]
    return slopes + [2 ** (-4 * i / below) for i in range(1, 2 * (n_heads - below), 2)]


def causal_alibi(n_heads: int, width: int, P: int, like: Tensor) -> Tensor:
    """Bias [1, N, width, P + width] of a row's queries on the prompt's keys and its own: slope·distance, -inf ahead."""
    slopes = torch.tensor(alibi_slopes(n_heads), dtype=like.dtype, device=like.device)  # [N]
    query = torch.arange(P, P + width, device=like.device)[:, None]  # [width, 1]
    distance = torch.arange(P + width, device=like.device) - query  # [width, P + width]
    bias = slopes[:, None, None] * distance  # [N, width, P + width]
    return bias.masked_fill_(distance > 0, -math.inf)[None]


def group_rows(lengths: Sequence[int], device: torch.device) -> list[Group]:
    """Groups of the rows, which are sorted by length: on the CPU runs of equally long ones, so that nothing is padded;
    elsewhere, where every call costs, of rows at least three quarters as long as the group's first."""
    least = 1.0 if device.type == "cpu" else 0.75
    runs: list[list[int]] = []
    for length in lengths:
        if not runs or not least * runs[-1][0] <= length <= runs[-1][0]:
            runs.append([])
        runs[-1].append(length)
    return [_group(run, device) for run in runs]


def _group(lengths: Sequence[int], device: torch.device) -> Group:
    rows, width, tokens = len(lengths), max(lengths), sum(lengths)
    if rows * width == tokens:
        return Group(rows, width, tokens, None, None)
    length = torch.tensor(lengths)[:, None]  # [B, 1]
    start = length.cumsum(0) - length
    column = torch.arange(width)  # [width]
    take = (start + column.clamp(max=length - 1)).flatten()  # pads repeat the row's last token
    drop = (column < length).flatten().nonzero()[:, 0]
    return Group(rows, width, tokens, take.to(device), drop.to(device))


def attend(q: Tensor, kv: Tensor, before: Tensor, bias: Tensor, groups: list[Group]) -> Tensor:
    """Causal attention of every row over the prompt's keys and values and its own.

    Args:
        q: [S, N, D]; kv: [S, N, 2, D], keys and values; before: [P, N, 2, D], the prompt's.
        bias: [1, N, W, P + W] of the widest row, from `causal_alibi`.
    Returns:
        [S, N·D]
    """
    sizes, P = [group.tokens for group in groups], len(before)
    outputs = []
    for group, queries, pairs in zip(groups, q.split(sizes), kv.split(sizes), strict=True):
        query = _as_rows(queries, group).transpose(1, 2)  # [B, N, width, D]
        prompt = before.to(kv.dtype).expand(group.rows, -1, -1, -1, -1)
        pair = torch.cat([prompt, _as_rows(pairs, group)], dim=1).transpose(1, 2)  # [B, N, P + width, 2, D]
        mask = bias[:, :, : group.width, : P + group.width]
        out = F.scaled_dot_product_attention(query, *pair.unbind(3), attn_mask=mask)  # [B, N, width, D]
        out = out.transpose(1, 2).flatten(2).flatten(0, 1)  # [B·width, N·D]
        outputs.append(out if group.drop is None else out.index_select(0, group.drop))
    return torch.cat(outputs)


def _as_rows(x: Tensor, group: Group) -> Tensor:
    """[tokens, …] → [B, width, …]"""
    x = x if group.take is None else x.index_select(0, group.take)
    return x.unflatten(0, (group.rows, group.width))
