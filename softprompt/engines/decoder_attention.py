"""Attention of packed rows for any decoder that uses transformers' attention interface.

`packed_attention` is registered in that interface under the name `ATTENTION`. Within the context
`uses_packed_attention`, the base calls it instead of its own attention function. The caller of the base's forward
passes a `RowsAttention` as the keyword argument `packed_rows`; the model passes it on to its attention layers.

No mask function is registered under this name, so transformers builds no mask. This module computes the masks from each
token's position in its row, virtual tokens included (P + index in the row). A sliding window is therefore the same as
if each row ran alone.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from softprompt.engines.prefix_attention import RowGroup, as_rows, group_rows
from softprompt.models.precision import autocast_dtype
from softprompt.utils.errors import ModelError

ATTENTION = "softprompt_packed"


class LayerKV(NamedTuple):
    """Keys [T, K, D] and values [T, K, D'] of T tokens in one attention layer with K key-value heads."""

    keys: Tensor
    values: Tensor


class AttentionOptions(NamedTuple):
    """The variant of attention that a layer computes.

    Attributes:
        scaling: Factor of the scores q · k; None means 1 / √D.
        window: Sliding window: the number of last positions that a token attends to, itself included; None means all.
        softcap: Replace each score s by softcap · tanh(s / softcap) (Gemma 2); None leaves the scores unchanged.
        sinks: [N], one logit per head that is added to the softmax as a key without a value (gpt-oss), or None.
    """

    scaling: float | None
    window: int | None
    softcap: float | None
    sinks: Tensor | None


class RowsAttention(Protocol):
    """Computes the attention of packed tokens; it knows to which row each token belongs, and which keys it attends
    to."""

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        """Compute the attention of S packed tokens in one layer.

        Args:
            module: The layer's attention module.
            q, k, v: Queries [S, N, D], keys [S, K, D] and values [S, K, D'] of these tokens.
        Returns:
            [S, N, D'].
        """
        ...


class PackedRows:
    """The `RowsAttention` of complete rows: the tokens of a row attend to the prompt and, causally, to their row.

    Args:
        lengths: Number of tokens of each row, in the order of the stream: longest first.
        device: The device that computes.
        P: Number of virtual tokens that precede each row.
        prompt: The prompt's keys and values by attention module; empty if P = 0.
        record: If given, each call of an attention module appends the module and the rows' own keys and values.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device,
        P: int,
        prompt: Mapping[nn.Module, LayerKV],
        record: list[tuple[nn.Module, LayerKV]] | None = None,
    ):
        self.lengths, self.device, self.P, self.prompt, self.record = lengths, device, P, prompt, record
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    @cached_property
    def groups(self) -> list[RowGroup]:
        """The groups of rows that one call of attention computes."""
        return group_rows(self.lengths, self.device)

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
        """Return the mask of a row of `width` tokens, [width, P + width] bool: True where a token attends to a key."""
        key = (width, window)
        if key not in self._masks:
            positions = torch.arange(self.P, self.P + width, device=device)
            self._masks[key] = visible(positions, self.P + width, window)
        return self._masks[key]


class PromptAndRows:
    """The `RowsAttention` of a stream that begins with the prompt: its P virtual tokens attend causally to themselves,
    and the rows attend to them and, causally, to their row.

    Args:
        rows: The attention of the rows behind P virtual tokens.
    """

    def __init__(self, rows: PackedRows):
        self.rows, self.P = rows, rows.P
        self.prompt = PackedRows([rows.P], rows.device, 0, {})

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        """See `RowsAttention.attend`."""
        virtual, tokens = (tuple(t[at] for t in (q, k, v)) for at in (slice(self.P), slice(self.P, None)))
        outputs = [self.prompt.attend(module, *virtual, options)] if self.P else []
        if self.rows.lengths:
            self.rows.prompt = {module: LayerKV(*virtual[1:])} if self.P else {}
            outputs.append(self.rows.attend(module, *tokens, options))
        return torch.cat(outputs)


def visible(positions: Tensor, keys: int, window: int | None) -> Tensor:
    """Return a causal mask [n, keys] bool for queries at `positions` [n] int64 and keys at positions 0 … keys - 1: True
    where a query attends to a key. With a sliding window, a query attends only to the last `window` positions, its own
    included."""
    distance = positions[:, None] - torch.arange(keys, device=positions.device)
    return (distance >= 0) & (distance < window) if window else distance >= 0


def check_uses_interface(base: PreTrainedModel) -> None:
    """Check that the base uses transformers' attention interface.

    Raises:
        ModelError: The base computes attention without transformers' attention interface.
    """
    models = [module for module in base.modules() if isinstance(module, PreTrainedModel)]
    if not any(model._can_set_attn_implementation() for model in models):
        raise ModelError(f"{type(base).__name__} computes attention without transformers' attention interface")


@contextmanager
def uses_packed_attention(base: PreTrainedModel) -> Iterator[None]:
    """Within this context, the attention layers of `base` call `packed_attention`."""
    configs = _configs(base)
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = ATTENTION
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


def _configs(base: PreTrainedModel) -> list[PreTrainedConfig]:
    """Return the configurations of a base and of its modules, each once."""
    if base not in _known_configs:  # looking for them takes a millisecond, and a decoding step is one forward pass
        _known_configs[base] = list({id(m.config): m.config for m in base.modules() if hasattr(m, "config")}.values())
    return _known_configs[base]


_known_configs: WeakKeyDictionary[PreTrainedModel, list[PreTrainedConfig]] = WeakKeyDictionary()


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
    """Compute attention with `packed_rows`. The signature is that of `transformers.AttentionInterface`.

    Args:
        query: [1, N, S, D]; key: [1, K, S, D]; value: [1, K, S, D'].
        scaling, sliding_window, softcap, s_aux: `AttentionOptions`, in the order of its attributes.
        packed_rows: The keyword argument that the caller gave to the model's forward.
    Returns:
        [1, S, N, D'], and None in place of the attention weights.

    Raises:
        ModelError: The model does not pass the keyword arguments of its forward on to its attention layers.
    """
    if packed_rows is None:
        raise ModelError(f"{type(module).__name__} gets no keyword arguments of the model's forward")
    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))  # [S, heads, size]
    options, on_cpu = AttentionOptions(scaling, sliding_window, softcap, s_aux), q.device.type == "cpu"
    # On the CPU, narrower dtypes are slow. Elsewhere, rotary embeddings in fp32 make q and k fp32, but not v.
    dtype = torch.promote_types(q.dtype, torch.float32) if on_cpu else autocast_dtype(q.device) or q.dtype
    with torch.autocast("cpu", enabled=False) if on_cpu else nullcontext():  # it would convert the arguments back
        return packed_rows.attend(module, *(t.to(dtype) for t in (q, k, v)), options)[None], None


AttentionInterface.register(ATTENTION, packed_attention)


def attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, options: AttentionOptions) -> Tensor:
    """Compute attention with G = N / K query heads for each key-value head: [B, T, N, D'].

    The G heads are computed as G · T queries of one head, so that keys and values are not repeated.

    Args:
        queries: [B, T, N, D]; keys: [B, W, K, D]; values: [B, W, K, D'].
        mask: [B or 1, T, W] bool, True where a query attends to a key.
    """
    (T, N), K = queries.shape[1:3], keys.shape[2]
    q = queries.unflatten(2, (K, N // K)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, K, G · T, D]
    k, v = keys.transpose(1, 2), values.transpose(1, 2)  # [B, K, W, …]
    mask = mask.repeat(1, N // K, 1)[:, None]  # [B or 1, 1, G · T, W]
    if options.sinks is not None:  # append a key with the sink as its score and zeros as its value
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
