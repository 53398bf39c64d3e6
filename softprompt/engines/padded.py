"""The padded engine: it pads rows to one length and runs the base's own forward, for any causal language model."""

import inspect
from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt.data.collate import Batch, chunks, collate_padded
from softprompt.data.tokenization import Example, count_targets
from softprompt.engines.linear_cross_entropy import cross_entropy_sum
from softprompt.models.capabilities import check_positions, max_positions
from softprompt.models.loading import word_embeddings
from softprompt.models.precision import autocast
from softprompt.prompt.soft_prompt import PromptEmbedding
from softprompt.utils.errors import ModelError
from softprompt.utils.model_config import layers_and_heads
from softprompt.utils.out_of_memory import is_out_of_memory

PROBE_TOKENS = 5  # how many tokens `check_forward` runs
_checked: WeakSet[nn.Module] = WeakSet()  # bases that passed `check_forward`


def prepend(
    prompt: Tensor, embeddings: Tensor, attention_mask: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Prepend the prompt to every row. Virtual tokens have attention mask 1 and label -100.

    Args:
        prompt: [P, H].
        embeddings: [B, T, H].
        attention_mask: [B, T] int64.
        labels: [B, T] int64.
    Returns:
        Embeddings [B, P+T, H] in the dtype of `embeddings`; attention mask and labels [B, P+T] int64.
    """
    B, P = len(embeddings), len(prompt)
    virtual = prompt.to(embeddings.dtype).expand(B, -1, -1)  # [B, P, H]
    ones = attention_mask.new_ones(B, P)
    return (
        torch.cat([virtual, embeddings], dim=1),
        torch.cat([ones, attention_mask], dim=1),
        torch.cat([torch.full_like(ones, -100), labels], dim=1),
    )


def padded_forward(base: PreTrainedModel, prompt: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Run the base's own forward over padded rows behind the prompt [P, H]; P = 0 is the bare base.

    Rows are padded on the right, so the position of a token is its index, which is transformers' default.

    Returns:
        Logits [B, P+T, V] in the dtype of the base's head, and labels [B, P+T] int64.
    """
    words = word_embeddings(base)(batch.input_ids)  # [B, T, H]
    embeddings, mask, labels = prepend(prompt, words, batch.attention_mask, batch.labels)
    return base(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits, labels


@torch.no_grad()
def check_forward(base: PreTrainedModel, compute_dtype: torch.dtype) -> None:
    """Check on a few tokens that a prompt can precede the text of `base`: its own forward over token ids, at the
    explicit positions 0 … T, must give the logits of `padded_forward` without a prompt.

    The base's own forward gets one more token, which must not change the logits before it. It gets explicit positions
    because transformers' `generate` passes them, while `padded_forward` leaves the positions to the base. BLOOM is not
    checked, since its forward is known; a base that has passed the check is not checked again.

    Raises:
        ModelError: The logits differ, because the base does more with a token than look up its embedding, does not
            count positions from 0 (RoBERTa), or attends to later tokens; or the base cannot be run on embeddings.
    """
    if base.config.model_type == "bloom" or base in _checked:
        return
    kind, words = type(base).__name__, word_embeddings(base).weight
    first = max(0, min(8, len(words) - PROBE_TOKENS))
    ids = torch.arange(first, len(words))[:PROBE_TOKENS].to(words.device)[None]  # [1, T]
    mask, positions = torch.ones_like(ids), {}
    if "position_ids" in inspect.signature(base.forward).parameters:
        positions["position_ids"] = torch.arange(ids.shape[1], device=ids.device)[None]  # [1, T]
    try:
        with autocast(words.device, compute_dtype):
            own = base(input_ids=ids, attention_mask=mask, use_cache=False, **positions).logits[:, :-1].float()
            ours, _ = padded_forward(base, words[:0], Batch(ids[:, :-1], mask[:, :-1], mask[:, :-1]))
    except Exception as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(f"{base.name_or_path}: {kind} cannot be run on embeddings: {reason}") from None
    off, size = (own - ours.float()).abs().max().item(), own.abs().max().item()
    if not off <= (1e-3 if compute_dtype is torch.float32 else 5e-2) * size:  # NaN is refused, too
        raise ModelError(
            f"{base.name_or_path}: {kind} gives other logits for word embeddings than for the words themselves (they "
            f"differ by {off:.2g}; the largest is {size:.2g}): it does more with a word than look up its embedding, "
            "does not count positions from 0, or attends to later words; take another base"
        )
    _checked.add(base)


class PromptTunedModel(nn.Module):
    """A prompt and its frozen base as one module, which `--print_model` prints and whose parameters are counted."""

    def __init__(self, prompt: PromptEmbedding, base: PreTrainedModel):
        super().__init__()
        self.prompt = prompt
        self.base = base

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See `padded_forward`."""
        return padded_forward(self.base, self.prompt(), batch)

    def trainable_parameters_line(self) -> str:
        """Return the numbers of parameters in the format of PEFT's `print_trainable_parameters`."""
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        whole = sum(p.numel() for p in self.parameters())
        return f"trainable params: {trainable:,} || all params: {whole:,} || trainable%: {100 * trainable / whole:.4f}"


class PaddedEngine:
    """The `Engine` for any causal language model, through the base's own forward under autocast. A window is cut into
    micro-batches of `rows_per_microbatch` rows (`rows_per_eval_batch` in evaluation), each padded to its longest
    row."""

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: Any,
        rows_per_microbatch: int,
        compute_dtype: torch.dtype,
        rows_per_eval_batch: int | None = None,
    ):
        """
        Raises:
            ModelError: See `check_forward`.
        """
        check_forward(base, compute_dtype)
        self.base = base
        self.compute_dtype = compute_dtype
        self.device = word_embeddings(base).weight.device
        self.rows_per_microbatch = rows_per_microbatch
        self.rows_per_eval_batch = rows_per_eval_batch or rows_per_microbatch
        self.pad_token_id = tokenizer.pad_token_id
        self.max_positions = max_positions(base)

    def accumulate(
        self, prompt: PromptEmbedding, window: Sequence[Example], grad_scale: Tensor | float
    ) -> tuple[Tensor, int]:
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        for rows in chunks(window, self.rows_per_microbatch):
            loss = self._loss(prompt(), rows)
            (loss * grad_scale).backward()
            total += loss.detach()
        return total, sum(map(count_targets, window))

    @torch.no_grad()
    def evaluate(self, prompt: Tensor | None, rows: Sequence[Example]) -> tuple[Tensor, int]:
        values = self._prompt_or_empty(prompt)
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        for some in chunks(rows, self.rows_per_eval_batch):
            total += self._loss(values, some)
        return total, sum(map(count_targets, rows))

    @torch.no_grad()
    def row_losses(self, prompt: Tensor | None, rows: Sequence[Example]) -> list[float]:
        values = self._prompt_or_empty(prompt)
        sums: list[float] = []
        for some in chunks(rows, self.rows_per_eval_batch):
            batch = self._collated(len(values), some)
            with autocast(self.device, self.compute_dtype):
                logits, labels = padded_forward(self.base, values, batch)
            each = zip(logits[:, None], labels[:, None], strict=True)  # [1, P+T, V], [1, P+T]
            sums += [cross_entropy_sum(*row).item() for row in each]
        return sums

    def state_dict(self) -> dict[str, Any]:
        return {}

    def activation_bytes(self, P: int, window: Sequence[Example]) -> int:
        size, words = self.compute_dtype.itemsize, word_embeddings(self.base)
        L, N = layers_and_heads(self.base.config)
        H, V = words.embedding_dim, words.num_embeddings
        width = P + max((len(e.input_ids) for e in window), default=0)
        layer = 4 * 6 * H + size * 16 * H + (4 + size) * N * width  # eager attention's scores
        return min(self.rows_per_microbatch, len(window)) * width * (L * layer + 3 * 4 * V)

    def __str__(self) -> str:
        return "padded engine"

    def _prompt_or_empty(self, prompt: Tensor | None) -> Tensor:
        """Return the prompt [P, H] on the device; for None an empty one [0, H]."""
        return word_embeddings(self.base).weight[:0] if prompt is None else prompt.to(self.device)

    def _collated(self, P: int, rows: Sequence[Example]) -> Batch:
        """Pad rows to one length on the device.

        Raises:
            ConfigError: A row behind P virtual tokens needs more positions than the base has.
        """
        check_positions(self.max_positions, P, max(len(row.input_ids) for row in rows), "a row")
        return collate_padded(rows, self.pad_token_id).to(self.device)

    def _loss(self, prompt: Tensor, rows: Sequence[Example]) -> Tensor:
        batch = self._collated(len(prompt), rows)
        with autocast(self.device, self.compute_dtype):
            return cross_entropy_sum(*padded_forward(self.base, prompt, batch))
