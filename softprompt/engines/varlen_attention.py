"""Attention of packed rows by torch's variable-length kernel (FlashAttention; Dao 2023, arXiv:2307.08691), on CUDA in
bf16 and fp16.

One call computes all rows of a micro-batch, without padding: the kernel gets the queries of all rows as one stream, the
keys and values of all rows (each row's own behind a copy of the prompt's) as another one, and where each row begins. A
row has P more keys than queries; the kernel aligns its causal mask and its window at the last query and the last key,
which is what attention behind a prompt needs.
"""

import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import varlen

from softprompt.engines.decoder_attention import AttentionOptions, LayerKV, PackedRows
from softprompt.models.precision import is_half
from softprompt.utils.transfer import to_device

MAX_HEAD_SIZE, HEAD_SIZE_MULTIPLE = 256, 8  # of the kernel
GROUPED_QUERIES = "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters  # since torch 2.12


class VarlenRows(PackedRows):
    """`PackedRows` that uses the variable-length kernel in all layers that it supports (see `is_supported`): those
    without soft caps and sinks whose keys and values have heads of the same size.

    Args:
        lengths: Number of tokens of each row, longest first.
        device: The device that computes.
        P: Number of virtual tokens that precede each row.
        prompt: The prompt's keys and values by attention module; empty if P = 0.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device, P: int, prompt: Mapping[nn.Module, LayerKV]):
        super().__init__(lengths, device, P, prompt)
        own = torch.tensor(lengths)  # [B]
        self.longest = int(own.max())
        self.query_starts = to_device(_starts(own), device)
        self.key_starts = to_device(_starts(own + P), device)
        self.key_index = to_device(key_index(own, P), device) if P else None

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        """See `RowsAttention.attend`."""
        if not is_supported(q, v, options):
            return super().attend(module, q, k, v, options)
        if self.key_index is not None:
            k, v = (
                torch.cat([shared.to(own.dtype), own]).index_select(0, self.key_index)
                for shared, own in zip(self.prompt[module], (k, v), strict=True)
            )
        grouped = {"enable_gqa": True} if GROUPED_QUERIES else {}
        if not GROUPED_QUERIES and q.shape[1] > k.shape[1]:
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        out = varlen.varlen_attn(
            q,
            k,
            v,
            self.query_starts,
            self.key_starts,
            self.longest,
            self.P + self.longest,
            scale=options.scaling,
            window_size=(options.window - 1 if options.window else -1, 0),
            **grouped,
        )
        assert isinstance(out, Tensor)
        return out


def is_supported(q: Tensor, v: Tensor, options: AttentionOptions) -> bool:
    """Whether the kernel computes this attention. `q` is [S, N, D], `v` is [S, K, D']."""
    D = q.shape[-1]
    fits = v.shape[-1] == D and D <= MAX_HEAD_SIZE and D % HEAD_SIZE_MULTIPLE == 0
    return fits and is_half(q.dtype) and options.softcap is None and options.sinks is None


def key_index(lengths: Tensor, P: int) -> Tensor:
    """Return where each row's keys are in [prompt; row 1; row 2; …]: for each of B rows the P virtual tokens, then its
    own tokens.

    Args:
        lengths: [B] int64, the number of tokens of each row.
    Returns:
        [B · P + S] int64.
    """
    row = torch.arange(len(lengths)).repeat_interleave(lengths + P)
    offset = torch.arange(len(row)) - _starts(lengths + P)[:-1][row]
    return torch.where(offset < P, offset, _starts(lengths)[:-1][row] + offset)


def _starts(lengths: Tensor) -> Tensor:
    """Return where each of B consecutive parts begins, and where the last one ends: [B + 1] int32."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
