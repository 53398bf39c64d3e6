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
from typing import Any, NamedTuple, Protocol

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


class AttentionOptions(NamedTuple):
    """What an attention layer asks for.

    Attributes:
        scaling: Factor of the scores; None is 1 / √D.
        window: How many positions back a token sees, itself included; None is all.
        softcap: Scores s become softcap · tanh(s / softcap) (Gemma 2); None leaves them.
        sinks: A score [N] of a key without a value (gpt-oss), or None.
    """

    scaling: float | None
    window: int | None
    softcap: float | None
    sinks: Tensor | None


class RowsAttention(Protocol):
    """Knows which rows the packed tokens belong to, and what they attend to."""

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        """Compute the attention of S packed tokens in one layer.

        Args:
            module: The attention module.
            q: [S, N, D]; k: [S, K, D]; v: [S, K, D'].
        Returns:
            [S, N, D'].
        """
        ...


class PackedRows:
    """The `RowsAttention` of whole rows: each attends to the prompt and, causally, to itself.

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
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        """See `RowsAttention.attend`."""
        if self.record is not None:
            self.record.append((module, LayerKV(k, v)))
        prompt = self.prompt.get(module)
        sizes, outputs = [group.tokens for group in self.groups], []
        for group, *parts in zip(self.groups, *(t.split(sizes) for t in (q, k, v)), strict=True):
            queries, keys, values = (as_rows(part, group) for part in parts)  # [B, T, heads, size]
            if prompt:
                keys, values = (
                    torch.cat([shared.to(own.dtype).expand(group.rows, -1, -1, -1), own], dim=1)
                    for shared, own in zip(prompt, (keys, values), strict=True)
                )
            mask = self.mask(group.width, options.window, q.device)
            out = attention(queries, keys, values, mask[None], options).flatten(0, 1)  # [B · T, N, D']
            outputs.append(out if group.unpad_index is None else out.index_select(0, group.unpad_index))
        return torch.cat(outputs)

    def mask(self, width: int, window: int | None, device: torch.device) -> Tensor:
        """Return which keys the tokens of a row see: [width, P + width] bool."""
        key = (width, window)
        if key not in self._masks:
            positions = torch.arange(self.P, self.P + width, device=device)
            self._masks[key] = visible(positions, self.P + width, window)
        return self._masks[key]


def visible(positions: Tensor, keys: int, window: int | None) -> Tensor:
    """Return which of the keys at positions 0 … keys - 1 the queries at `positions` [n] see: [n, keys] bool, causal,
    and with a sliding window at most `window` positions back."""
    distance = positions[:, None] - torch.arange(keys, device=positions.device)
    return (distance >= 0) & (distance < window) if window else distance >= 0


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
    packed_rows: RowsAttention | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Pass queries, keys and values to the `RowsAttention` of the forward; see `transformers.AttentionInterface`.

    Args:
        query: [1, N, S, D]; key: [1, K, S, D]; value: [1, K, S, D'].
        sliding_window, softcap, s_aux: See `AttentionOptions`.
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
    options = AttentionOptions(scaling, sliding_window, softcap, s_aux)
    return packed_rows.attend(module, q, k, v, options)[None], None


AttentionInterface.register(ATTENTION, packed_attention)


def attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, options: AttentionOptions) -> Tensor:
    """Compute attention with G = N / K query heads for each key-value head: [B, T, N, D'].

    The G heads are computed as G · T queries of one head, so that keys and values are not repeated.

    Args:
        queries: [B, T, N, D]; keys: [B, W, K, D]; values: [B, W, K, D'].
        mask: [B or 1, T, W] bool, which keys a query sees.
    """
    (T, N), K = queries.shape[1:3], keys.shape[2]
    q = queries.unflatten(2, (K, N // K)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, K, G · T, D]
    k, v = keys.transpose(1, 2), values.transpose(1, 2)  # [B, K, W, …]
    mask = mask.repeat(1, N // K, 1)[:, None]  # [B or 1, 1, G · T, W]
    if options.sinks is not None:  # one more key, of zeros, whose score is the sink, and whose value is zero
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -math.inf)
        column = options.sinks.detach().to(q.dtype).view(K, N // K, 1).expand(-1, -1, T).reshape(1, K, -1, 1)
        mask = torch.cat([bias.expand(-1, K, -1, -1), column.expand(len(bias), -1, -1, -1)], dim=3)
    if options.softcap is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=options.scaling)
    else:
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if options.scaling is None else options.scaling)
        scores = (scores / options.softcap).tanh() * options.softcap
        scores = scores.masked_fill(~mask, -math.inf) if options.sinks is None else scores + mask
        out = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype) @ v
    return out.unflatten(2, (N // K, T)).permute(0, 3, 1, 2, 4).flatten(2, 3)  # [B, T, N, D']
