"""The packed schedule for transformers' decoders: it runs the base's own modules with `packed_attention`."""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt.data.collate import Packed, has_targets
from softprompt.data.tokenization import Example, count_targets
from softprompt.engines.activation_measure import ActivationMeasure, measure_activations
from softprompt.engines.decoder_attention import (
    LayerKV,
    PackedRows,
    PromptAndRows,
    RowsAttention,
    check_uses_interface,
    uses_packed_attention,
)
from softprompt.engines.flex_attention import FlexRows
from softprompt.engines.joint_schedule import JointSchedule
from softprompt.engines.microbatch_engine import LossInputs
from softprompt.engines.prefix_schedule import PrefixKV, PrefixSchedule
from softprompt.engines.recompute import layers_to_recompute, recomputed
from softprompt.engines.split_base import split_base
from softprompt.engines.varlen_attention import VarlenRows
from softprompt.models.loading import word_embeddings
from softprompt.models.precision import autocast
from softprompt.utils.errors import ModelError
from softprompt.utils.transfer import to_device

ROWS = {"sdpa": PackedRows, "varlen": VarlenRows, "flex_attention": FlexRows}


class DecoderSchedule(PrefixSchedule):
    """Runs packed rows through the layers of a transformers decoder.

    The base runs under autocast: matrix products in the compute dtype; the residual stream, the norms and the loss in
    the wide dtype (fp32, or fp64 if the compute dtype is fp64).

    `PrefixKV.layers` has two tensors for each attention module, in the order of `layout`: keys [P, K, D] and values
    [P, K, D'].
    """

    def __init__(
        self,
        base: PreTrainedModel,
        compute_dtype: torch.dtype,
        gradient_checkpointing: bool = False,
        attn_implementation: str = "sdpa",
    ):
        """
        Args:
            attn_implementation: A name in ROWS: the function that computes the attention of rows.

        Raises:
            ModelError: The base does not use transformers' attention interface; it cannot be split into a body and a
                head; or it has no layers that support `gradient_checkpointing`.
        """
        check_uses_interface(base)
        self.base, self.compute_dtype, self.attn_implementation = base, compute_dtype, attn_implementation
        self.body, self.head = split_base(base, compute_dtype)
        self.device, self.gradient_checkpointing = word_embeddings(base).weight.device, gradient_checkpointing
        self.recomputed_layers = layers_to_recompute(base) if gradient_checkpointing else []
        self._measured: ActivationMeasure | None = None
        self._layout: list[tuple[nn.Module, LayerKV]] | None = None

    @property
    def layout(self) -> list[tuple[nn.Module, LayerKV]]:
        """The attention modules in the order in which the forward calls them, each with empty keys [0, K, D] and values
        [0, K, D'], which show its sizes.

        Raises:
            ModelError: A forward calls an attention module several times, or calls none.
        """
        if self._layout is None:
            record: list[tuple[nn.Module, LayerKV]] = []
            with torch.no_grad():
                self._run_row(word_embeddings(self.base)(torch.zeros(1, dtype=torch.int64, device=self.device)), record)
            if not record or len({module for module, _ in record}) < len(record):
                raise ModelError(f"{type(self.base).__name__} has no attention layers, or calls one of them repeatedly")
            self._layout = [(module, LayerKV(kv.keys[:0].detach(), kv.values[:0].detach())) for module, kv in record]
        return self._layout

    def run_prompt(self, prompt: Tensor | None) -> PrefixKV:
        """See `PrefixSchedule.run_prompt`."""
        if prompt is None or not len(prompt):
            nothing = word_embeddings(self.base)(torch.zeros(0, dtype=torch.int64, device=self.device))
            return PrefixKV([t for _, kv in self.layout for t in kv], nothing)
        record: list[tuple[nn.Module, LayerKV]] = []
        hidden = self._run_row(prompt, record)
        return PrefixKV([t for _, kv in record for t in kv], hidden[-1:])

    def by_module(self, prefix: PrefixKV) -> dict[nn.Module, LayerKV]:
        """Return the prompt's keys and values by attention module; an empty dictionary if P = 0."""
        pairs = zip(prefix.layers[::2], prefix.layers[1::2], strict=True)
        here = {module: LayerKV(*pair) for (module, _), pair in zip(self.layout, pairs, strict=True)}
        return here if len(prefix.layers[0]) else {}

    def rows_forward(self, prefix: PrefixKV, batch: Packed) -> LossInputs:
        """See `PrefixSchedule.rows_forward`."""
        P, hidden = len(prefix.layers[0]), prefix.last_hidden[:0]
        if batch.lengths:
            rows = self._rows(batch.lengths, P, self.by_module(prefix))
            positions = to_device(torch.cat(_positions(P, batch)), self.device)
            hidden = self._run_rows(word_embeddings(self.base)(batch.input_ids), positions, rows)
        return _loss_inputs(prefix.last_hidden, hidden, batch)

    def activation_bytes(self, P: int, window: Sequence[Example], tokens_per_microbatch: int) -> int:
        """See `Schedule.activation_bytes`."""
        parts = [(_lengths(part), sum(map(count_targets, part))) for part in self.cut(window, tokens_per_microbatch, P)]
        rows = (self.microbatch_bytes(P, lengths) + self.head.working_bytes(n) for lengths, n in parts)
        return self.head.nbytes + self.prompt_bytes(P) + max(rows, default=0)

    def microbatch_bytes(self, P: int, lengths: Sequence[int]) -> int:
        """Estimate the bytes that rows of `lengths` tokens keep until their backward pass."""
        return self.measured.bytes(lengths, P, self.gradient_checkpointing)

    def token_bytes(self, P: int, T: int) -> int:
        """Estimate the bytes that each of the tokens of a micro-batch keeps, in rows of T tokens."""
        return math.ceil(self.microbatch_bytes(P, [T]) / T)

    def prompt_bytes(self, P: int) -> int:
        """Estimate the bytes that the P virtual tokens keep until the end of a window."""
        return self.measured.bytes([P])

    @property
    def measured(self) -> ActivationMeasure:
        """The memory that tokens keep for the backward pass; it is measured at the first access."""
        if self._measured is None:
            self._measured = measure_activations(self.base, self._run_behind_zeros, behind_prompt=True)
        return self._measured

    def _run_behind_zeros(self, embeddings: Tensor, P: int) -> None:
        """Run one row [T, H] behind P virtual tokens whose keys and values are 0."""
        T, layout = len(embeddings), self.layout if P else []
        zeros = {module: LayerKV(*(_zeros(t, P) for t in kv)) for module, kv in layout}
        rows = PackedRows([T], self.device, P, zeros)
        self.run_body(embeddings, torch.arange(P, P + T, device=self.device), rows)

    def _rows(self, lengths: list[int], P: int, prompt: Mapping[nn.Module, LayerKV] | None = None) -> PackedRows:
        """Return the attention of packed rows. For the arguments see `PackedRows`."""
        kind = ROWS[self.attn_implementation] if lengths else PackedRows
        return kind(lengths, self.device, P, prompt or {})

    def _run_rows(self, embeddings: Tensor, positions: Tensor, rows: RowsAttention) -> Tensor:
        """Call `run_body`, with gradient checkpointing if it is on and there will be a backward pass."""
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        again = partial(uses_packed_attention, self.base)
        with recomputed(self.recomputed_layers, again) if recompute else nullcontext():
            return self.run_body(embeddings, positions, rows)

    def _run_row(self, embeddings: Tensor, record: list[tuple[nn.Module, LayerKV]] | None = None) -> Tensor:
        """Run one row without a prompt: embeddings [T, H] → final hidden states [T, H]. For `record` see
        `PackedRows`."""
        T = len(embeddings)
        rows = PackedRows([T], self.device, 0, {}, record)
        return self.run_body(embeddings, torch.arange(T, device=self.device), rows)

    def run_body(self, embeddings: Tensor, positions: Tensor, rows: RowsAttention) -> Tensor:
        """Run the base without its head.

        Args:
            embeddings: [S, H].
            positions: [S] int64, the position of each token in its row; virtual tokens count.
            rows: Computes attention.
        Returns:
            Final hidden states [S, H].
        """
        with uses_packed_attention(self.base), autocast(self.device, self.compute_dtype):
            out = self.body(
                inputs_embeds=embeddings[None], position_ids=positions[None], use_cache=False, packed_rows=rows
            )
        return out.last_hidden_state[0]


class JointDecoderSchedule(JointSchedule[Packed], DecoderSchedule):
    """Runs the prompt and the rows of a micro-batch as one packed stream [P + S].

    It is for a sharded base, where the ranks must make their passes in step (see `models.fsdp`) and may have different
    numbers of micro-batches. A window of M micro-batches gathers the layers 2 · M times; with a pass of its own for the
    prompt, it would be 2 · (M + 1) times.
    """

    def forward(self, prompt: Tensor, batch: Packed) -> LossInputs:
        """See `JointSchedule.forward`."""
        P, words = len(prompt), word_embeddings(self.base)(batch.input_ids)  # [S, H]
        hidden = words
        if P or batch.lengths:
            positions = to_device(torch.cat([torch.arange(P), *_positions(P, batch)]), self.device)
            rows = PromptAndRows(self._rows(batch.lengths, P))
            hidden = self._run_rows(torch.cat([prompt.to(words.dtype), words]), positions, rows)  # [P + S, H]
        return _loss_inputs(hidden[:P][-1:], hidden[P:], batch)

    def has_targets(self, batch: Packed) -> bool:
        """See `JointSchedule.has_targets`."""
        return has_targets(batch)

    def empty_prompt(self) -> Tensor:
        """See `JointSchedule.empty_prompt`."""
        return word_embeddings(self.base).weight[:0]


def _zeros(t: Tensor, P: int) -> Tensor:
    """Return zeros like the leaves of `PrefixSchedule.accumulate`: [P, …] for keys or values [0, …]."""
    dtype = torch.promote_types(t.dtype, torch.float32)
    return torch.zeros(P, *t.shape[1:], dtype=dtype, device=t.device, requires_grad=True)


def _lengths(rows: Sequence[Example]) -> list[int]:
    return [len(row.input_ids) for row in rows]


def _positions(P: int, batch: Packed) -> list[Tensor]:
    """Return the positions of each row's tokens behind P virtual tokens, int64."""
    return [torch.arange(P, P + n) for n in batch.lengths]


def _loss_inputs(last_hidden: Tensor, hidden: Tensor, batch: Packed) -> LossInputs:
    """Return the loss inputs of a micro-batch.

    Args:
        last_hidden: The last hidden state of the last virtual token [1, H]; [0, H] without a prompt.
        hidden: The last hidden states of the S tokens, [S, H].
    """
    first = batch.first_targets if len(last_hidden) else batch.first_targets[:0]  # [f]
    before = last_hidden.expand(len(first), -1)  # [f, H]
    return LossInputs(torch.cat([before, hidden.index_select(0, batch.predictors)]), torch.cat([first, batch.targets]))
