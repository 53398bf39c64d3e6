"""One forward pass of continuous batching: its input tokens, and their attention over the KV cache.

A pass runs one packed stream of S tokens without padding, which mixes slots in two phases:

    stream   newest token of slot 0 | newest token of slot 3 | text of slot 2 (T tokens) | text of slot 1 (T tokens)
             decode: 1 token of each slot in the cache         prefill: all tokens of slots that were just refilled

Layer norms, projections and MLPs see the S tokens as one matrix. Only attention distinguishes them: a decoded token
attends to its slot's row in the cache; a prefilled text attends to its prompt and, causally, to itself.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from softprompt.engines.bloom import PrefixKV
from softprompt.engines.prefix_attention import RowGroup, attend, causal_alibi, group_rows
from softprompt.generation.kv_cache import KVCache
from softprompt.generation.sampling import RequestState


@dataclass
class Slot:
    """A request that occupies a row of the KV cache, or waits for one.

    Attributes:
        prefix: Keys and values of the request's prompt.
        cached: Number of the row's positions that are in the cache, virtual tokens included; 0 before prefill.
    """

    state: RequestState
    prefix: PrefixKV
    cached: int = 0

    @property
    def P(self) -> int:
        """Number of virtual tokens before the text."""
        return len(self.prefix.layers[0])

    def restarted(self) -> "Slot":
        """Reset this slot to its state before prefill and return it. The tokens of the answer so far are kept and are
        prefilled together with the text."""
        self.state.restore_rng()
        self.cached = 0
        return self


class PrefillGroup(NamedTuple):
    """Slots whose texts are prefilled after the same prompt, the longest text first.

    Attributes:
        prefix: Keys and values of the prompt.
        slots: Indices of the slots.
        lengths: Number of tokens of each text.
        attention_groups: How `attend` batches the texts.
        span: The slice of the stream that contains the texts.
    """

    prefix: PrefixKV
    slots: list[int]
    lengths: list[int]
    attention_groups: list[RowGroup]
    span: slice


class PackedStep:
    """The stream of one forward pass over n slots: the newest tokens of the slots that decode, then the texts of the
    slots that are prefilled, grouped by prompt.

    Attributes:
        decoding: Indices of the slots that decode, in the order of the stream.
        prefills: The groups of slots that are prefilled.
        positions: Position of each slot's last token in its row, counted from 0 at the first virtual token.
        input_ids: The stream [S] int64.
        last_index: Index of each slot's last token in the stream [n] int64.
    """

    def __init__(self, slots: Sequence[Slot], device: torch.device):
        self.device, self.positions = device, [slot.P + len(slot.state.token_ids) - 1 for slot in slots]
        self.decoding = [b for b, slot in enumerate(slots) if slot.cached]
        stream, last_index = [slots[b].state.token_ids[-1] for b in self.decoding], [0] * len(slots)
        for index, b in enumerate(self.decoding):
            last_index[b] = index
        self.prefills: list[PrefillGroup] = []
        for prefix, uncached in _uncached_by_prefix(slots):
            start = len(stream)
            for b in uncached:
                stream += slots[b].state.token_ids
                last_index[b] = len(stream) - 1
            lengths = [len(slots[b].state.token_ids) for b in uncached]
            span = slice(start, len(stream))
            self.prefills.append(PrefillGroup(prefix, uncached, lengths, group_rows(lengths, device), span))
        self.input_ids = torch.tensor(stream, device=device)  # [S]
        self.last_index = torch.tensor(last_index, device=device)  # [n]


def _uncached_by_prefix(slots: Sequence[Slot]) -> Iterator[tuple[PrefixKV, list[int]]]:
    """Group the slots that await prefill by prompt; yield each prompt and its slots' indices, longest text first."""
    uncached = [b for b, slot in enumerate(slots) if not slot.cached]
    for prefix in {id(slots[b].prefix): slots[b].prefix for b in uncached}.values():
        group = [b for b in uncached if slots[b].prefix is prefix]
        yield prefix, sorted(group, key=lambda b: -len(slots[b].state.token_ids))


class StepAttention:
    """Attention of one packed step, called once per layer by `bloom.run_blocks`. It also writes the new keys and values
    into the cache.

    One batched product over the cache computes all decoding slots, up to the longest of their rows; the bias masks the
    positions after the end of shorter rows. `prefix_attention.attend` computes the texts, group by group.
    """

    def __init__(self, cache: KVCache, step: PackedStep):
        N = len(cache.slopes)
        self.cache, self.step, self.n = cache, step, len(step.positions)
        self.width = 1 + max((step.positions[b] for b in step.decoding), default=0)
        rows = [(b * N + h) * cache.width + step.positions[b] for b in step.decoding for h in range(N)]
        self.write_rows = torch.tensor(rows, device=step.device)  # [decoding · N], indices into [B · N · W, D]
        self.decoding = torch.tensor(step.decoding, device=step.device)
        dtype = cache.layers[0][0].dtype
        self.decode_bias = self._decode_bias().to(dtype)  # [n · N, 1, width]
        longest_text = max((group.lengths[0] for group in step.prefills), default=0)
        self.longest_prefix = max((len(group.prefix.layers[0]) for group in step.prefills), default=0)
        bias = causal_alibi(N, longest_text, self.longest_prefix, cache.slopes)
        self.prefill_bias = bias.to(dtype)  # [1, N, longest text, longest prefix + longest text]

    def __call__(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        """Attend in one layer.

        Args:
            layer: The layer's index.
            q: Queries [S, N, D] in the dtype of the cache.
            kv: Keys and values [S, N, 2, D] in the same dtype.

        Returns:
            [S, N · D] in the dtype of `q`.
        """
        decoding, outputs = len(self.step.decoding), []
        if decoding:
            new = kv[:decoding].unbind(2)  # keys and values, each [decoding, N, D]
            for cache, values in zip(self.cache.layers[layer], new, strict=True):
                cache.view(-1, cache.shape[-1]).index_copy_(0, self.write_rows, values.flatten(0, 1))
            outputs.append(self._decode(layer, q))
        for group in self.step.prefills:
            prefix = group.prefix.layers[layer]  # [P, N, 2, D]
            bias = self.prefill_bias[..., self.longest_prefix - len(prefix) :]
            outputs.append(attend(q[group.span], kv[group.span], prefix, bias, group.attention_groups))
            self._store(layer, group, prefix, kv[group.span])
        return torch.cat(outputs) if self.step.prefills else outputs[0]

    def _decode(self, layer: int, q: Tensor) -> Tensor:
        """Compute softmax(q · keysᵀ / √D + bias) · values for the newest tokens: [S, N, D] → [decoding, N · D].

        All n slots are computed, so that the cache is read as a view without a copy. The rows of slots in prefill are
        dropped from the result.
        """
        caches = (cache[: self.n, :, : self.width] for cache in self.cache.layers[layer])
        keys, values = (cache.flatten(0, 1) for cache in caches)  # each [n · N, width, D]
        if self.step.prefills:
            q = q.index_select(0, self.step.last_index)
        q = q.reshape(len(keys), 1, -1)  # [n · N, 1, D]
        scale = q.shape[-1] ** -0.5
        scores = torch.baddbmm(self.decode_bias, q, keys.transpose(1, 2), alpha=scale)  # [n · N, 1, width]
        out = torch.bmm(scores.softmax(-1), values).view(self.n, -1)  # [n, N · D]
        return out.index_select(0, self.decoding) if self.step.prefills else out

    def _store(self, layer: int, group: PrefillGroup, prefix: Tensor, kv: Tensor) -> None:
        """Copy the keys and values of the prompt [P, N, 2, D] and of the texts [tokens, N, 2, D] into the cache."""
        P = len(prefix)
        for b, text in zip(group.slots, kv.split(group.lengths), strict=True):  # text: [T, N, 2, D]
            for cache, virtual, new in zip(self.cache.layers[layer], prefix.unbind(2), text.unbind(2), strict=True):
                cache[b, :, :P] = virtual.transpose(0, 1)
                cache[b, :, P : P + len(new)] = new.transpose(0, 1)

    def _decode_bias(self) -> Tensor:
        """Return the bias [n · N, 1, width] of each slot's newest token for the positions of its row: ALiBi (-slope ·
        distance) up to the token itself, -inf after it."""
        position = torch.tensor(self.step.positions, device=self.step.device)[:, None]  # [n, 1]
        distance = torch.arange(self.width, device=self.step.device) - position  # [n, width]
        masked = distance.to(self.cache.slopes.dtype).masked_fill_(distance > 0, -torch.inf)
        return (self.cache.slopes[:, None] * masked[:, None]).flatten(0, 1)[:, None]
