"""The base's own forward over padded rows behind a prompt, and the check that a base can be run in this way."""

import inspect
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt.data.collate import Batch
from softprompt.engines.probe import log_probability_error, probe_ids
from softprompt.models.loading import word_embeddings
from softprompt.models.precision import autocast
from softprompt.prompt.soft_prompt import PromptEmbedding
from softprompt.utils.errors import ModelError
from softprompt.utils.out_of_memory import reason_or_raise

_checked: WeakSet[nn.Module] = WeakSet()  # bases that passed `check_forward`


def prepend(
    prompt: Tensor, embeddings: Tensor, attention_mask: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Prepend the prompt to each row. Virtual tokens have attention mask 1 and label -100.

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


def padded_forward(base: PreTrainedModel, prompt: Tensor, batch: Batch, last: int = 0) -> tuple[Tensor, Tensor]:
    """Run the base's own forward over padded rows behind the prompt [P, H]; P = 0 is the bare base.

    Rows are padded on the right, so a token's position is its index, as transformers assumes by default.

    Args:
        last: Compute only the logits of this many last positions, if the base can do so; 0 means all.
    Returns:
        Logits [B, P+T, V] (or at least the last ones) in the dtype that the base returns, and labels [B, P+T] int64.
    """
    words = word_embeddings(base)(batch.input_ids)  # [B, T, H]
    embeddings, mask, labels = prepend(prompt, words, batch.attention_mask, batch.labels)
    keep = {"logits_to_keep": last} if last and "logits_to_keep" in inspect.signature(base.forward).parameters else {}
    return base(inputs_embeds=embeddings, attention_mask=mask, use_cache=False, **keep).logits, labels


@torch.no_grad()
def check_forward(base: PreTrainedModel, compute_dtype: torch.dtype) -> None:
    """Check on a few tokens that a prompt can be prepended to the embeddings of `base`: for T token ids, its own
    forward must give the log-probabilities of `padded_forward` without a prompt.

    The base's own forward gets one more token, which must not change the logits before it, and the explicit positions
    0 … T, if it accepts positions: transformers' `generate` passes them, while `padded_forward` leaves them to the
    base. BLOOM is not checked, because its forward is known. A base that has passed the check is not checked again.

    Raises:
        ModelError: The predictions differ: the base does more with a token than look up its embedding, does not count
            positions from 0 (RoBERTa), or attends to later tokens. Or the base cannot be run on embeddings, or its
            logits are not finite.
    """
    if base.config.model_type == "bloom" or base in _checked:
        return
    kind, words, ids = type(base).__name__, word_embeddings(base).weight, probe_ids(base)  # ids [1, T + 1]
    mask, positions = torch.ones_like(ids), {}
    if "position_ids" in inspect.signature(base.forward).parameters:
        positions["position_ids"] = torch.arange(ids.shape[1], device=ids.device)[None]  # [1, T + 1]
    try:
        with autocast(words.device, compute_dtype):
            own = base(input_ids=ids, attention_mask=mask, use_cache=False, **positions).logits[:, :-1]
            ours, _ = padded_forward(base, words[:0], Batch(ids[:, :-1], mask[:, :-1], mask[:, :-1]))
    except Exception as error:
        raise ModelError(f"{base.name_or_path}: {kind} cannot be run on embeddings: {reason_or_raise(error)}") from None
    if own.double().log_softmax(-1).isnan().any():
        dtype = str(compute_dtype).removeprefix("torch.")
        raise ModelError(
            f"{base.name_or_path}: {kind} gives logits that are not finite in {dtype}; take another dtype (--fp16 "
            "false, --bf16 false) or another base"
        )
    off, size = log_probability_error(ours, own)
    if off > (1e-3 if compute_dtype.itemsize >= 4 else 5e-2) * size:
        raise ModelError(
            f"{base.name_or_path}: {kind} gives other logits for token embeddings than for the token ids (the "
            f"log-probability of a word differs by {off:.2g}): it does more with a token than look up its embedding, "
            "does not count positions from 0, or attends to later tokens; take another base"
        )
    _checked.add(base)


class PromptTunedModel(nn.Module):
    """A prompt and its frozen base as one module: `--print_model` prints it, and its parameters are counted."""

    def __init__(self, prompt: PromptEmbedding, base: PreTrainedModel):
        super().__init__()
        self.prompt = prompt
        self.base = base

    def trainable_parameters_line(self) -> str:
        """Return the numbers of parameters in the format of PEFT's `print_trainable_parameters`."""
        trainable = sum(p.numel() for p in self.prompt.trained_parameters().values())
        whole = trainable + self.base.num_parameters()  # counts a byte of two 4-bit values as two parameters
        return f"trainable params: {trainable:,} || all params: {whole:,} || trainable%: {100 * trainable / whole:.4f}"
