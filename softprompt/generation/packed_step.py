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

from softprompt.engines.prefix_attention import RowGroup, group_rows
from softprompt.engines.prefix_schedule import PrefixKV
from softprompt.generation.sampling import RequestState


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


class PackedStep:
    """The stream of one forward pass over n slots: the newest tokens of the decoding slots, then the texts of the slots
    in prefill, grouped by prompt. After a restart, a text includes the answer so far.

    Attributes:
        decoding: Indices of the slots that decode, in the order of the stream.
        prefills: The groups of slots that are prefilled.
        positions: Position of each slot's last token in its row; the first virtual token has position 0.
        input_ids: The stream [S] int64.
        last_index: Index in the stream of each slot's last token [n] int64.
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
    """Group the slots that await prefill by prompt. Yield each prompt's keys and values and its slots' indices, longest
    text first."""
    uncached = [b for b, slot in enumerate(slots) if not slot.cached]
    for prefix in {id(slots[b].prefix): slots[b].prefix for b in uncached}.values():
        group = [b for b in uncached if slots[b].prefix is prefix]
        yield prefix, sorted(group, key=lambda b: -len(slots[b].state.token_ids))
