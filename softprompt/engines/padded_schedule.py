"""The padded schedule, for any causal language model: rows are padded and run through the base's own body and head."""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.data.collate import Batch, collate_padded, cut_by_tokens
from softprompt.data.tokenization import IGNORE, Example, count_targets
from softprompt.engines.activation_measure import ActivationMeasure, measure_activations
from softprompt.engines.joint_schedule import JointSchedule
from softprompt.engines.microbatch_engine import LossInputs
from softprompt.engines.padded import check_forward, prepend
from softprompt.engines.recompute import layers_to_recompute, recomputed
from softprompt.engines.split_base import split_base
from softprompt.models.capabilities import check_positions, max_positions
from softprompt.models.loading import word_embeddings
from softprompt.models.precision import autocast


class PaddedRows(NamedTuple):
    """A padded micro-batch and the places of its targets, in the order of `LossInputs`: first the f targets that are
    the first token of their row, then the n others, row by row.

    Attributes:
        batch: The padded rows, tensors [B, T].
        rows: [f + n] int64, the row of each target.
        columns: [f + n] int64, the column of each target in `batch`.
        targets: [f + n] int64, token ids.
        first: f.
    """

    batch: Batch
    rows: Tensor
    columns: Tensor
    targets: Tensor
    first: int


class PaddedSchedule(JointSchedule[PaddedRows]):
    """The `Schedule` for any causal language model. It prepends the prompt to each padded row, and runs one micro-batch
    after the other under autocast."""

    kind = "padded"
    attn_implementation = "auto"

    def __init__(
        self,
        base: PreTrainedModel,
        pad_token_id: int,
        compute_dtype: torch.dtype,
        gradient_checkpointing: bool = False,
    ):
        """
        Raises:
            ModelError: See `padded.check_forward`; or the base cannot be split into a body and a head; or it has no
                layers that support `gradient_checkpointing`.
        """
        check_forward(base, compute_dtype)
        self.base, self.pad_token_id, self.compute_dtype = base, pad_token_id, compute_dtype
        self.body, self.head = split_base(base, compute_dtype)
        self.device, self.gradient_checkpointing = word_embeddings(base).weight.device, gradient_checkpointing
        self.recomputed_layers = layers_to_recompute(base) if gradient_checkpointing else []
        self.max_positions = max_positions(base)
        self._measured: ActivationMeasure | None = None

    def cut(self, rows: Sequence[Example], tokens: int, P: int) -> Iterator[list[Example]]:
        """See `Schedule.cut`. Padding and virtual tokens count as tokens.

        Raises:
            ConfigError: P virtual tokens and a row together need more positions than the base has.
        """
        longest = max((len(row.input_ids) for row in rows), default=0)
        check_positions(self.max_positions, P, longest, "a row")
        return cut_by_tokens(rows, tokens, pad_behind=P)

    def collate(self, rows: Sequence[Example]) -> PaddedRows:
        """See `Schedule.collate`."""
        batch = collate_padded(rows, self.pad_token_id)
        at = (batch.labels != IGNORE).nonzero()  # [f + n, 2]
        at = at[(at[:, 1] > 0).argsort(stable=True)]
        targets, device = batch.labels[at[:, 0], at[:, 1]], self.device
        where = (t.to(device, non_blocking=True) for t in (at[:, 0], at[:, 1], targets))
        return PaddedRows(batch.to(device), *where, first=int((at[:, 1] == 0).sum()))

    def has_targets(self, batch: PaddedRows) -> bool:
        """See `JointSchedule.has_targets`."""
        return len(batch.targets) > 0

    def empty_prompt(self) -> Tensor:
        """See `JointSchedule.empty_prompt`."""
        return word_embeddings(self.base).weight[:0]

    def activation_bytes(self, P: int, window: Sequence[Example], tokens_per_microbatch: int) -> int:
        """See `Schedule.activation_bytes`."""
        parts = list(self.cut(window, tokens_per_microbatch, P))
        rows = (
            self.microbatch_bytes(P, [len(part[0].input_ids)] * len(part))
            + self.head.working_bytes(sum(map(count_targets, part)))
            for part in parts
        )
        return self.head.nbytes + max(rows, default=0)

    def microbatch_bytes(self, P: int, lengths: Sequence[int]) -> int:
        """Estimate the bytes that rows of `lengths` tokens, padding included, keep until their backward pass."""
        return self.measured.bytes([P + T for T in lengths], 0, self.gradient_checkpointing)

    def token_bytes(self, P: int, T: int) -> int:
        """Estimate the bytes that each of the tokens of a micro-batch keeps, virtual ones included, in rows of T tokens
        behind P virtual ones."""
        return math.ceil(self.microbatch_bytes(P, [T]) / (P + T))

    def prompt_bytes(self, P: int) -> int:
        """Return 0: the virtual tokens belong to the rows."""
        return 0

    @property
    def measured(self) -> ActivationMeasure:
        """The memory that tokens keep for the backward pass; it is measured at the first access."""
        if self._measured is None:
            self._measured = measure_activations(self.base, self._run_padded_row)
        return self._measured

    def _run_padded_row(self, embeddings: Tensor, P: int) -> None:
        """Run one row [T, H] whose last token is padding: without any, transformers may leave out the mask."""
        mask = torch.ones(1, len(embeddings), dtype=torch.int64, device=self.device)
        mask[:, 1:][:, -1:] = 0
        self._run_body(embeddings[None], attention_mask=mask)

    def __str__(self) -> str:
        return ""

    def forward(self, prompt: Tensor, batch: PaddedRows) -> LossInputs:
        """See `JointSchedule.forward`."""
        P, (input_ids, attention_mask, labels) = len(prompt), batch.batch
        words = word_embeddings(self.base)(input_ids)  # [B, T, H]
        embeddings, mask, _ = prepend(prompt, words, attention_mask, labels)  # [B, P + T, …]
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        with recomputed(self.recomputed_layers) if recompute else nullcontext():
            hidden = self._run_body(embeddings, attention_mask=mask)  # [B, P + T, H]
        skipped = 0 if P else batch.first  # without a prompt, no position predicts a first token
        predictors = (batch.rows * hidden.shape[1] + P + batch.columns - 1)[skipped:]
        return LossInputs(hidden.flatten(0, 1).index_select(0, predictors), batch.targets[skipped:])

    def _run_body(self, embeddings: Tensor, **others: Any) -> Tensor:
        """Run the base without its head: embeddings [B, P + T, H] → final hidden states [B, P + T, H]."""
        with autocast(self.device, self.compute_dtype):
            return self.body(inputs_embeds=embeddings, use_cache=False, **others).last_hidden_state
