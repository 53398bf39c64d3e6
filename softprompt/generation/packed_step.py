"""One forward pass of continuous batching: its input tokens, and their attention over the KV cache.

The input is one packed stream of S tokens, without padding. It contains slots in two phases:

    stream   newest token of slot 0 | newest token of slot 3 | text of slot 2 (T tokens) | text of slot 1 (T tokens)
             decode: 1 token of each slot in the cache         prefill: all tokens of slots that were just refilled

Norms, projections and MLPs process all S tokens as one matrix [S, H]. Only attention distinguishes the phases: a newest
token attends to its slot's row in the cache; the tokens of a prefilled text attend to their prompt and, causally, to
their text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from softprompt.engines.prefix_attention import RowGroup, group_rows
from softprompt.engines.prefix_schedule import PrefixKV
from softprompt.generation.sampling import RequestState
from softprompt.utils.transfer import to_device


@dataclass
class Slot:
    """A request that occupies a row of the KV cache, or waits for one.

    Attributes:
        state: The request, with its text and its answer so far.
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

    @property
    def length(self) -> int:
        """Number of positions of the row: virtual tokens, text and answer so far."""
        return self.P + len(self.state.token_ids)

    @property
    def most(self) -> int:
        """The maximum number of positions of the row."""
        return self.P + self.state.max_tokens

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
        attention_groups: The groups of texts that one call of attention computes, see `group_rows`.
        span: The slice of the stream that contains the texts.
    """

    prefix: PrefixKV
    slots: list[int]
    lengths: list[int]
    attention_groups: list[RowGroup]
    span: slice

    @property
    def P(self) -> int:
        """Number of virtual tokens before the texts."""
        return len(self.prefix.layers[0])


@dataclass
class PackedStep:
    """The stream of one forward pass over n slots: the newest tokens of the d decoding slots, then the texts of the
    slots in prefill, grouped by prompt. After a restart, a text includes the answer so far.

    Attributes:
        prefills: The groups of slots that are prefilled.
        width: Number of positions of the KV cache that decoding reads: as many as the longest row of a decoding slot
            has, or more; 0 if no slot decodes.
        input_ids: The stream [S] int64.
        last_index: Index in the stream of each slot's last token [n] int64.
        decoding: Indices of the slots that decode [d] int64, in the order of the stream.
        positions: Position of each slot's last token in its row [n] int64; the first virtual token has position 0.
    """

    prefills: list[PrefillGroup]
    width: int
    input_ids: Tensor
    last_index: Tensor
    decoding: Tensor
    positions: Tensor

    @classmethod
    def of(cls, slots: Sequence[Slot], device: torch.device) -> "PackedStep":
        """Return the step over the slots in use."""
        decoding = [b for b, slot in enumerate(slots) if slot.cached]
        stream, last_index = [slots[b].state.token_ids[-1] for b in decoding], [0] * len(slots)
        for index, b in enumerate(decoding):
            last_index[b] = index
        prefills: list[PrefillGroup] = []
        for prefix, uncached in _uncached_by_prefix(slots):
            start = len(stream)
            for b in uncached:
                stream += slots[b].state.token_ids
                last_index[b] = len(stream) - 1
            lengths = [len(slots[b].state.token_ids) for b in uncached]
            span = slice(start, len(stream))
            prefills.append(PrefillGroup(prefix, uncached, lengths, group_rows(lengths, device), span))
        positions = [slot.length - 1 for slot in slots]
        width = max((slots[b].length for b in decoding), default=0)
        tensors = (torch.tensor(t, dtype=torch.int64) for t in (stream, last_index, decoding, positions))
        return cls(prefills, width, *(to_device(t, device) for t in tensors))

    @classmethod
    def empty(cls, n: int, width: int, device: torch.device) -> "PackedStep":
        """Return a step in which slots 0 … n-1 decode, with zeros as tokens and positions."""
        zeros, slots = torch.zeros(n, dtype=torch.int64, device=device), torch.arange(n, device=device)
        return cls([], width, zeros, slots, slots, zeros.clone())

    @property
    def device(self) -> torch.device:
        return self.input_ids.device

    @property
    def decode_positions(self) -> Tensor:
        """Position of the newest token of each decoding slot [d] int64."""
        return self.positions.index_select(0, self.decoding) if self.prefills else self.positions


def _uncached_by_prefix(slots: Sequence[Slot]) -> Iterator[tuple[PrefixKV, list[int]]]:
    """Group the slots that await prefill by prompt. Yield each prompt's keys and values and its slots' indices, longest
    text first."""
    uncached = [b for b, slot in enumerate(slots) if not slot.cached]
    for prefix in {id(slots[b].prefix): slots[b].prefix for b in uncached}.values():
        group = [b for b in uncached if slots[b].prefix is prefix]
        yield prefix, sorted(group, key=lambda b: -len(slots[b].state.token_ids))
