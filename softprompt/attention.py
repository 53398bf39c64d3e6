"""Causal attention with ALiBi of packed rows over the prompt's keys and values and their own."""

import math
from collections.abc import Sequence
from itertools import groupby
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
    return bias.masked_fill(distance > 0, -math.inf)[None]


def group_rows(lengths: Sequence[int], device: torch.device) -> list[Group]:
    """On the CPU a group is a run of equally long rows, so that nothing is padded; elsewhere all rows are one group."""
    runs = [list(run) for _, run in groupby(lengths)] if device.type == "cpu" else [list(lengths)]
    return [_group(run, device) for run in runs if run]


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


def attend(q: Tensor, k: Tensor, v: Tensor, before: tuple[Tensor, Tensor], bias: Tensor, groups: list[Group]) -> Tensor:
    """Causal attention of every row [S, N, D] over the prompt's keys and values [P, N, D] and its own; → [S, N·D]."""
    sizes = [group.tokens for group in groups]
    P, outputs = len(before[0]), []
    for group, *of_rows in zip(groups, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        query, key, value = (_as_rows(x, group) for x in of_rows)  # [B, width, N, D]
        key, value = (_behind(p, x).transpose(1, 2) for p, x in zip(before, (key, value), strict=True))
        mask = bias[:, :, : group.width, : P + group.width]
        out = F.scaled_dot_product_attention(query.transpose(1, 2), key, value, attn_mask=mask)  # [B, N, width, D]
        out = out.transpose(1, 2).flatten(2).flatten(0, 1)  # [B·width, N·D]
        outputs.append(out if group.drop is None else out.index_select(0, group.drop))
    return torch.cat(outputs)


def _as_rows(x: Tensor, group: Group) -> Tensor:
    x = x if group.take is None else x.index_select(0, group.take)
    return x.unflatten(0, (group.rows, group.width))


def _behind(prompt: Tensor, rows: Tensor) -> Tensor:
    """[P, N, D] before each of [B, width, N, D]; → [B, P + width, N, D]."""
    return torch.cat([prompt.to(rows.dtype).expand(len(rows), -1, -1, -1), rows], dim=1)
