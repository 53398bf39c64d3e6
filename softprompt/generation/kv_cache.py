"""Where the keys and values of answers lie while they are written, and attention over them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from softprompt.engines.bloom import PrefixKV
from softprompt.engines.prefix_attention import RowGroup, alibi_slopes, attend, causal_alibi, group_rows
from softprompt.generation.sampling import Writer
from softprompt.models.bloom_weights import BloomShape


@dataclass
class Slot:
    """An answer in its place. `held`: positions whose keys and values are in memory, the virtual tokens among them."""

    writer: Writer
    prefix: PrefixKV
    held: int = 0

    @property
    def P(self) -> int:
        return len(self.prefix.layers[0])

    def again(self) -> "Slot":
        """As it comes in anew: with its text and what is written of the answer."""
        self.writer.rewind()
        self.held = 0
        return self


class PrefixGroup(NamedTuple):
    """Texts that come in behind the same prompt, longest first: the places they take, the groups of attention, and
    where in the stream they are."""

    prefix: PrefixKV
    places: list[int]
    lengths: list[int]
    groups: list[RowGroup]
    stream: slice


class Step:
    """What one forward runs: the stream is the last token of each place that is held, in the places' order, then the
    texts that come in, part by part. `last` is where in it each place's last token stands, `positions` how many tokens
    stand before that in its row, virtual ones included."""

    def __init__(self, places: Sequence[Slot], device: torch.device):
        self.device, self.positions = device, [place.P + len(place.writer.ids) - 1 for place in places]
        self.held = [b for b, place in enumerate(places) if place.held]
        stream, last = [places[b].writer.ids[-1] for b in self.held], [0] * len(places)
        for at, b in enumerate(self.held):
            last[b] = at
        self.parts: list[PrefixGroup] = []
        for prefix, fresh in _by_prefix(places):
            start = len(stream)
            for b in fresh:
                stream += places[b].writer.ids
                last[b] = len(stream) - 1
            lengths = [len(places[b].writer.ids) for b in fresh]
            self.parts.append(
                PrefixGroup(prefix, fresh, lengths, group_rows(lengths, device), slice(start, len(stream)))
            )
        self.ids = torch.tensor(stream, device=device)  # [S]
        self.last = torch.tensor(last, device=device)  # [n]


def _by_prefix(places: Sequence[Slot]) -> Iterator[tuple[PrefixKV, list[int]]]:
    """The places whose texts come in, by the prompt before them, longest text first."""
    fresh = [b for b, place in enumerate(places) if not place.held]
    for prefix in {id(places[b].prefix): places[b].prefix for b in fresh}.values():
        some = [b for b in fresh if places[b].prefix is prefix]
        yield prefix, sorted(some, key=lambda b: -len(places[b].writer.ids))


class KVCache:
    """Keys and values of B places, W positions each: for each layer two tensors [B, N, W, D]. They begin as zeros: what
    lies behind a row's end is weighted with 0, and must be a number."""

    def __init__(self, shape: BloomShape, places: int, width: int, like: Tensor):
        size = (places, shape.N, width, shape.D)
        self.width, self.layers = width, [(like.new_zeros(size), like.new_zeros(size)) for _ in range(shape.L)]
        wide = torch.promote_types(like.dtype, torch.float32)  # for distances: bf16 has no 257
        self.slopes = torch.tensor(alibi_slopes(shape.N), dtype=wide, device=like.device)  # [N]

    def move(self, source: int, target: int, held: int) -> None:
        """One place's keys and values to another place."""
        for layer in self.layers:
            for memory in layer:
                memory[target, :, :held] = memory[source, :, :held]


class StepAttention:
    """Attention of one step's stream (see `bloom.run_blocks`): the last tokens of the places that are held look at
    their rows in memory, all places in one product; texts that come in look at their prompt and at themselves. New keys
    and values are written into the places."""

    def __init__(self, memory: KVCache, step: Step):
        N = len(memory.slopes)
        self.memory, self.step, self.n = memory, step, len(step.positions)
        self.width = 1 + max((step.positions[b] for b in step.held), default=0)
        rows = [(b * N + h) * memory.width + step.positions[b] for b in step.held for h in range(N)]
        self.rows = torch.tensor(rows, device=step.device)  # [held · N]: where new keys and values go
        self.held = torch.tensor(step.held, device=step.device)
        dtype = memory.layers[0][0].dtype
        self.bias = self._bias().to(dtype)  # [n · N, 1, width]
        longest = max((part.lengths[0] for part in step.parts), default=0)
        self.behind = max((len(part.prefix.layers[0]) for part in step.parts), default=0)
        text_bias = causal_alibi(N, longest, self.behind, memory.slopes)  # [1, N, longest, behind + longest]
        self.text_bias = text_bias.to(dtype)

    def __call__(self, i: int, q: Tensor, kv: Tensor) -> Tensor:
        held, out = len(self.step.held), []
        if held:
            for memory, new in zip(self.memory.layers[i], kv[:held].unbind(2), strict=True):  # new: [held, N, D]
                memory.view(-1, memory.shape[-1]).index_copy_(0, self.rows, new.flatten(0, 1))
            out.append(self._of_held(i, q))
        for part in self.step.parts:
            before = part.prefix.layers[i]  # [P, N, 2, D]
            bias = self.text_bias[..., self.behind - len(before) :]
            out.append(attend(q[part.stream], kv[part.stream], before, bias, part.groups))
            self._write(i, part, before, kv[part.stream])
        return torch.cat(out) if self.step.parts else out[0]

    def _of_held(self, i: int, q: Tensor) -> Tensor:
        """softmax(q · keysᵀ / √D + bias) · values of the places' last tokens: [S, N, D] → [held, N · D]."""
        keys, values = (m[: self.n, :, : self.width].flatten(0, 1) for m in self.memory.layers[i])  # [n · N, width, D]
        if self.step.parts:
            q = q.index_select(0, self.step.last)
        q = q.reshape(len(keys), 1, -1)  # [n · N, 1, D]
        scores = torch.baddbmm(self.bias, q, keys.transpose(1, 2), alpha=q.shape[-1] ** -0.5)  # [n · N, 1, width]
        out = torch.bmm(scores.softmax(-1), values).view(self.n, -1)  # [n, N · D]
        return out.index_select(0, self.held) if self.step.parts else out

    def _write(self, i: int, part: PrefixGroup, before: Tensor, kv: Tensor) -> None:
        P = len(before)
        for b, pairs in zip(part.places, kv.split(part.lengths), strict=True):  # [T, N, 2, D]
            for memory, virtual, new in zip(self.memory.layers[i], before.unbind(2), pairs.unbind(2), strict=True):
                memory[b, :, :P] = virtual.transpose(0, 1)
                memory[b, :, P : P + len(new)] = new.transpose(0, 1)

    def _bias(self) -> Tensor:
        """ALiBi of each place's last token on the positions up to its own: slope · distance, and -inf behind."""
        here = torch.tensor(self.step.positions, device=self.step.device)[:, None]  # [n, 1]
        distance = torch.arange(self.width, device=self.step.device) - here  # [n, width]
        reach = distance.to(self.memory.slopes.dtype).masked_fill_(distance > 0, -torch.inf)
        return (self.memory.slopes[:, None] * reach[:, None]).flatten(0, 1)[:, None]
