"""Packed rows in the attention of any transformers decoder, through transformers' attention interface.

`packed_attention` is registered under the name `ATTENTION`. Within the context `uses_packed_attention`, a base calls it
in place of its own attention. It gets the description of the rows as the keyword argument `packed_rows` of the base's
forward, which models pass on to their attention.

A name that has no mask function makes transformers build no mask; which keys a query sees is decided here, by real
positions (P + index in the row), so that a sliding window counts as it would if each row ran alone.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from softprompt.engines.prefix_attention import RowGroup, as_rows
from softprompt.utils.errors import ModelError

ATTENTION = "softprompt_packed"


class LayerKV(NamedTuple):
    """Keys [P, K, D] and values [P, K, D'] of the prompt in one attention layer; K key-value heads."""

    keys: Tensor
    values: Tensor


class PackedRows:
    """What an attention layer must know of the packed rows.

    Args:
        groups: The rows, as in `prefix_attention`.
        P: Number of virtual tokens that precede each row.
        prompt: For each attention module, the prompt's keys and values; empty if P = 0.
        record: If given, the rows' own keys and values are appended for each call of an attention module.
    """

    def __init__(
        self,
        groups: Sequence[RowGroup],
        P: int,
        prompt: Mapping[nn.Module, LayerKV],
        record: list[tuple[nn.Module, LayerKV]] | None = None,
    ):
        self.groups, self.P, self.prompt, self.record = groups, P, prompt, record
        self._masks: dict[tuple[int, int | None, int], Tensor] = {}

    def mask(self, width: int, window: int | None, repeats: int, device: torch.device) -> Tensor:
        """Return which keys the tokens of a row see: [repeats · width, P + width] bool, causal, and with a sliding
        window at most `window` positions back."""
        key = (width, window, repeats)
        if key not in self._masks:
            query = torch.arange(self.P, self.P + width, device=device)[:, None]
            distance = query - torch.arange(self.P + width, device=device)
            visible = (distance >= 0) & (distance < window) if window else distance >= 0
            self._masks[key] = visible.repeat(repeats, 1)
        return self._masks[key]


def check_uses_interface(base: PreTrainedModel) -> None:
    """
    Raises:
        ModelError: The base computes attention without transformers' attention interface.
    """
    models = [module for module in base.modules() if isinstance(module, PreTrainedModel)]
    if not any(model._can_set_attn_implementation() for model in models):
        raise ModelError(f"{type(base).__name__} computes attention without transformers' attention interface")


@contextmanager
def uses_packed_attention(base: PreTrainedModel) -> Iterator[None]:
    """Within this context, the attention layers of `base` call `packed_attention`."""
    configs = {id(m.config): m.config for m in base.modules() if hasattr(m, "config")}.values()
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = ATTENTION
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    packed_rows: PackedRows | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of each row to the prompt and to itself; see `transformers.AttentionInterface`.

    Args:
        query: [1, N, S, D]; key: [1, K, S, D]; value: [1, K, S, D'].
        sliding_window: How many positions back a token sees, itself included.
        softcap: Scores s become softcap · tanh(s / softcap) (Gemma 2).
        s_aux: Attention sinks, a score [N] of a key without a value (gpt-oss).
    Returns:
        [1, S, N, D'], and no attention weights.

    Raises:
        ModelError: The model does not pass keyword arguments on to its attention.
    """
    if packed_rows is None:
        raise ModelError(f"{type(module).__name__} gets no keyword arguments of the model's forward")
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # [S, heads, size]
    if q.device.type == "cpu":  # where attention in narrower dtypes is slow
        q, k, v = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k, v))
    if packed_rows.record is not None:
        packed_rows.record.append((module, LayerKV(k, v)))
    prompt = packed_rows.prompt.get(module)
    sizes, outputs = [group.tokens for group in packed_rows.groups], []
    for group, *parts in zip(packed_rows.groups, *(t.split(sizes) for t in (q, k, v)), strict=True):
        queries, keys, values = (as_rows(part, group) for part in parts)  # [B, T, heads, size]
        if prompt:
            keys, values = (
                torch.cat([shared.to(own.dtype).expand(group.rows, -1, -1, -1), own], dim=1)
                for shared, own in zip(prompt, (keys, values), strict=True)
            )
        mask = packed_rows.mask(group.width, sliding_window, q.shape[1] // k.shape[1], q.device)
        out = _attend(queries, keys, values, mask, scaling, softcap, s_aux)  # [B, T, N, D']
        out = out.flatten(0, 1)
        outputs.append(out if group.unpad_index is None else out.index_select(0, group.unpad_index))
    return torch.cat(outputs)[None], None


AttentionInterface.register(ATTENTION, packed_attention)


def _attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Compute attention with G = N / K query heads for each key-value head: [B, T, N, D'].

    The G heads are computed as G · T queries of one head, so that keys and values are not repeated.

    Args:
        queries: [B, T, N, D]; keys: [B, P + T, K, D]; values: [B, P + T, K, D'].
        mask: [G · T, P + T] bool.
        sinks: [N] or None.
    """
    (T, N), K = queries.shape[1:3], keys.shape[2]
    q = queries.unflatten(2, (K, N // K)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, K, G · T, D]
    k, v = keys.transpose(1, 2), values.transpose(1, 2)  # [B, K, P + T, …]
    if sinks is not None:  # one more key, of zeros, whose score is the sink, and whose value is zero
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -math.inf)
        column = sinks.detach().to(q.dtype).view(K, N // K, 1).expand(-1, -1, T).reshape(K, -1, 1)  # [K, G · T, 1]
        mask = torch.cat([bias.expand(K, -1, -1), column], dim=2)[None]  # [1, K, G · T, P + T + 1]
    if softcap is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    else:
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scaling is None else scaling)
        scores = (scores / softcap).tanh() * softcap
        scores = scores.masked_fill(~mask, -math.inf) if sinks is None else scores + mask
        out = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype) @ v
    return out.unflatten(2, (N // K, T)).permute(0, 3, 1, 2, 4).flatten(2, 3)  # [B, T, N, D']
