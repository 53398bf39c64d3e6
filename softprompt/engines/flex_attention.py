"""Attention of packed rows by torch's FlexAttention (Dong et al. 2024, arXiv:2412.05496), on CUDA: for ALiBi and soft
caps, which the variable-length kernel does not compute.

One call computes all rows of a micro-batch: queries are the stream of S tokens, keys are [prompt; stream], so the
prompt's keys and values are not repeated for each row. A mask function says which keys a query attends to. The kernel
skips each block of 128 queries × 128 keys in which no query attends to any key; `_visible_blocks` derives the other
blocks from the rows' lengths. Both streams are padded to whole blocks, and one compiled kernel serves all
micro-batches.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental import _config as symbolic_shapes_config
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from softprompt.engines.decoder_attention import AttentionOptions, LayerKV, PackedRows
from softprompt.utils.transfer import to_device

BLOCK = 128
PROMPT, NO_QUERY, NO_KEY = -1, -2, -3  # in place of a row's number: virtual tokens and padding
ScoreFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # score, batch, head, query, key → score


class FlexStream:
    """The masks of a micro-batch's packed rows behind a prompt.

    Args:
        lengths: Number of tokens of each row.
        device: The device that computes.
        P: Number of virtual tokens that precede each row.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device, P: int):
        self.lengths, self.P, self.S = torch.tensor(lengths), P, sum(lengths)
        row = torch.arange(len(lengths)).repeat_interleave(self.lengths)
        position = P + torch.cat([torch.arange(n) for n in lengths])
        queries, keys = _padding(self.S), _padding(P + self.S)
        virtual = torch.arange(P)
        self.query_row = to_device(F.pad(row, (0, queries), value=NO_QUERY), device)
        self.query_position = to_device(F.pad(position, (0, queries)), device)
        key_row = torch.cat([torch.full_like(virtual, PROMPT), row])
        self.key_row = to_device(F.pad(key_row, (0, keys), value=NO_KEY), device)
        self.key_position = to_device(F.pad(torch.cat([virtual, position]), (0, keys)), device)
        self._masks: dict[int | None, BlockMask] = {}

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        score_mod: ScoreFunction | None = None,
        scale: float | None = None,
        window: int | None = None,
    ) -> Tensor:
        """Compute the attention of all rows.

        Args:
            q: Queries [S, N, D].
            k, v: Keys [P + S, K, D] and values [P + S, K, D'], those of the prompt first.
            score_mod: Changes the scores.
            scale: Factor of the scores q · k; None means 1 / √D.
            window: See `AttentionOptions`.
        Returns:
            [S, N, D'].
        """
        query, key, value = (_padded(t) for t in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        with any_sizes():
            out = _kernel(q.device.type)(query, key, value, score_mod, self.mask(window), scale, enable_gqa=grouped)
        return out[0, :, : self.S].transpose(0, 1)

    def mask(self, window: int | None) -> BlockMask:
        """Return the mask of all layers with this window."""
        if window not in self._masks:
            visible = _visible_blocks(self.lengths, self.P)  # [queries / BLOCK, keys / BLOCK] bool
            index = visible.int().argsort(dim=1, descending=True, stable=True)
            count, index = (to_device(t.int()[None, None], self.query_row.device) for t in (visible.sum(1), index))
            sizes = len(self.query_row), len(self.key_row)
            self._masks[window] = BlockMask.from_kv_blocks(
                count, index, BLOCK_SIZE=BLOCK, mask_mod=self.mask_function(window), seq_lengths=sizes
            )
        return self._masks[window]

    def mask_function(self, window: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """Return FlexAttention's mask function: whether a query attends to a key, by their indices."""
        query_row, key_row = self.query_row, self.key_row
        query_position, key_position = self.query_position, self.key_position

        def of_row(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            same = (key_row[key] == query_row[query]) | ((key_row[key] == PROMPT) & (query_row[query] != NO_QUERY))
            return same & (key_position[key] <= query_position[query])

        if window is None:
            return of_row

        def of_window(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            near = query_position[query] - key_position[key] < window
            return of_row(batch, head, query, key) & near

        return of_window

    def alibi(self, slopes: Tensor) -> ScoreFunction:
        """Return the score function of ALiBi with the slopes [N] fp32: score - slope · distance."""
        query_position, key_position = self.query_position, self.key_position

        def with_bias(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return score - slopes[head] * (query_position[query] - key_position[key])

        return with_bias


class FlexRows(PackedRows):
    """`PackedRows` that uses FlexAttention in all layers without sinks; the arguments are those of `VarlenRows`."""

    def __init__(self, lengths: Sequence[int], device: torch.device, P: int, prompt: Mapping[nn.Module, LayerKV]):
        super().__init__(lengths, device, P, prompt)
        self.stream = FlexStream(lengths, device, P)

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        """See `RowsAttention.attend`."""
        if options.sinks is not None:
            return super().attend(module, q, k, v, options)
        if self.P:
            k, v = (
                torch.cat([shared.to(own.dtype), own]) for shared, own in zip(self.prompt[module], (k, v), strict=True)
            )
        score_mod = None if options.softcap is None else soft_cap(options.softcap)
        return self.stream.attend(q, k, v, score_mod, options.scaling, options.window)


def soft_cap(limit: float) -> ScoreFunction:
    """Return the score function limit · tanh(score / limit)."""

    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return limit * torch.tanh(score / limit)

    return capped


@cache
def _kernel(device_type: str) -> Any:
    """Return FlexAttention, compiled for any size on CUDA. Elsewhere it is not compiled and has no backward pass; tests
    use it there to check masks and score functions."""
    return torch.compile(flex_attention, dynamic=True) if device_type == "cuda" else flex_attention


def any_sizes() -> AbstractContextManager[None]:
    """Return a context in which a compiled function does not assume that two sizes are always equal because they are
    equal in its first call. Otherwise it would be compiled again for the next micro-batch in which they differ."""
    return symbolic_shapes_config.patch(use_duck_shape=False)


def _visible_blocks(lengths: Tensor, P: int) -> Tensor:
    """Return which blocks of BLOCK keys the rows of each block of BLOCK queries may attend to, [queries / BLOCK,
    keys / BLOCK] bool. Sliding windows are not considered here; the mask function applies them."""
    S = int(lengths.sum())
    start = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])[:-1].repeat_interleave(lengths)  # of each token's row
    first = torch.arange(0, S + _padding(S), BLOCK).clamp(max=S - 1)  # token of each block of queries
    last = (first + BLOCK - 1).clamp(max=S - 1)
    block = torch.arange((P + S + _padding(P + S)) // BLOCK)
    own = (block >= (P + start[first])[:, None] // BLOCK) & (block <= (P + last)[:, None] // BLOCK)
    return own | (block * BLOCK < P)


def _padding(size: int) -> int:
    """Return how many tokens of padding a stream of `size` tokens needs to consist of whole blocks, at least two of
    them: torch would compile a function again for a dimension of size 1."""
    return max(-size % BLOCK, 2 * BLOCK - size)


def _padded(t: Tensor) -> Tensor:
    """[S, heads, size] → [1, heads, S rounded up to whole blocks, size]."""
    return F.pad(t, (0, 0, 0, 0, 0, _padding(len(t)))).transpose(0, 1)[None]
