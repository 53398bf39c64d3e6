"""Add a prompt to a base's vocabulary as P new tokens, whose embeddings are the virtual tokens.

The result is a model of the base's own class, which needs none of this project's code. The new tokens are never
generated.

BLOOM applies a layer norm to the word embeddings, and a prompt is learned in the space before it. So the rows of the
prompt are used as embeddings unchanged.

With a tied head, a row of the prompt would also compute the logit of its new token. These rows have large norms, so
this logit might be the largest. Therefore the head is untied, and each new token has a row of its own in it.

Let h = γ⊙z + β be the output of the final layer norm. z sums to zero, so the row k/γ has the constant logit k·Σ(β/γ).
If that sum is not nearly zero, k is chosen so that the logit is very negative. Otherwise, or if the final norm is not a
layer norm with bias, the row is the mean of the other rows. Its logit is then the mean of the other logits, which never
exceeds the largest one. By Jensen's inequality, the token's probability is at most 1/V at any temperature.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt.data.collate import Batch
from softprompt.engines.padded import padded_forward
from softprompt.models.loading import word_embeddings
from softprompt.models.quantization import check_not_quantized
from softprompt.prompt.soft_prompt import InputEmbeddings
from softprompt.utils.errors import ModelError

NEVER_LOGIT = -1e4  # fp16 can represent it; exp(-1e4 / temperature) is 0 even in fp64 up to temperature 13
ERROR_DEVIATIONS = 8  # standard deviations of rounding errors that a constant logit must tolerate
TOLERANCE = 1e-4  # relative to the largest logit; sums in another order differ by less


def bake_prompt(base: PreTrainedModel, prompt: Tensor, ids: list[int], dtype: torch.dtype) -> float | None:
    """Add a prompt to the vocabulary of `base` in place, untie its head, and cast its weights to `dtype`.

    Before the cast, the result is checked in fp32: its logits after the new tokens must equal those of the original
    base after the prompt.

    Args:
        base: The base, which is frozen and put in eval mode, too.
        prompt: [P, H], any float dtype.
        ids: P consecutive token ids for the virtual tokens.
        dtype: Dtype of the result.

    Returns:
        The constant logit of the new tokens, or None if it is the mean of the other logits.

    Raises:
        ModelError: The base is quantized, has no linear head, cannot be resized, or does more with a token than look
            up its embedding.
    """
    _check_kind(base)
    base.requires_grad_(False).eval().float()
    V = min(ids[0], word_embeddings(base).num_embeddings)  # known tokens; a base may have spare rows after them
    text = torch.arange(min(V, 8))
    wanted = _logits(base, prompt, text)
    _untie(base)
    _resize(base, max(word_embeddings(base).num_embeddings, ids[-1] + 1))
    words, head = word_embeddings(base).weight, _head(base)
    words[V : ids[0]] = 0  # ids that neither the base nor any text uses
    words[ids] = prompt.to(words) / _embedding_scale(base, ids)
    constant, row = _row_of_head(base, dtype)
    if head.bias is not None:
        constant, row = NEVER_LOGIT, torch.zeros_like(words[0])
        head.bias[V : ids[-1] + 1] = NEVER_LOGIT
    head.weight[V : ids[-1] + 1] = head.weight[:V].mean(0) if row is None else row
    _check_same(base, wanted[:, :V], _logits(base, prompt[:0], torch.cat([torch.tensor(ids), text]))[len(ids) :, :V])
    base.to(dtype)  # type: ignore[arg-type]
    base.config.dtype = dtype
    return constant


def constant_logit_row(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return a row [H] fp32 for the head whose logit is about NEVER_LOGIT for every output h of the final layer norm.

    Rounding errors are estimated as if their terms had independent signs. Rounding of the row changes the logit by v·z,
    where v is γ⊙row minus its mean. Rounding of h changes it by about |row⊙h|·eps/2.

    Args:
        weight: The layer norm's γ [H], any float dtype.
        bias: The layer norm's β [H], any float dtype.
        dtype: The dtype in which the row will be stored.

    Returns:
        The row, or None if Σ(β/γ) is too close to zero.
    """
    gamma, beta = weight.to(dtype).double(), bias.to(dtype).double()
    row = (1 / gamma) * (NEVER_LOGIT / (beta / gamma).sum())
    row = row.to(dtype).double()
    across = gamma * row
    error = torch.finfo(dtype).eps / 2 * torch.sqrt(across.square().sum() + (row * beta).square().sum())
    spread = (across - across.mean()).norm() + error
    if not row.isfinite().all() or row @ beta + ERROR_DEVIATIONS * spread > NEVER_LOGIT / 2:
        return None
    return row.float()


def _row_of_head(base: PreTrainedModel, dtype: torch.dtype) -> tuple[float | None, Tensor | None]:
    """Return the constant logit and its row if the head follows a layer norm `ln_f`, as in BLOOM, GPT-2 and Falcon."""
    norm = getattr(base.base_model, "ln_f", None)
    if not isinstance(norm, nn.LayerNorm) or norm.bias is None or norm.weight.shape[0] != _head(base).in_features:
        return None, None
    row = constant_logit_row(norm.weight, norm.bias, dtype)
    return (None if row is None else NEVER_LOGIT), row


def _check_kind(base: PreTrainedModel) -> None:
    check_not_quantized(base)
    name, head = type(base).__name__, base.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ModelError(
            f"{base.name_or_path}: {name} has no linear head, so the prompt cannot be stored as tokens; use infer.py "
            "or softprompt.SoftPromptModel"
        )


def _embedding_scale(base: PreTrainedModel, ids: list[int]) -> Tensor:
    """Return the output [P, H] of the embedding module for rows of ones: 1, or a factor such as Gemma's √H.

    The rows of the prompt are divided by it, so that the module returns the prompt. `_check_same` refuses a module that
    does more than scale its rows.
    """
    word_embeddings(base).weight[ids] = 1
    return InputEmbeddings(base)[torch.tensor(ids)]


def _head(base: PreTrainedModel) -> nn.Linear:
    return base.get_output_embeddings()  # type: ignore[return-value]


def _untie(base: PreTrainedModel) -> None:
    head = _head(base)
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in (base.config, base.config.get_text_config()):
        config.tie_word_embeddings = False
    base.all_tied_weights_keys = {}


def _resize(base: PreTrainedModel, rows: int) -> None:
    try:
        base.resize_token_embeddings(rows, mean_resizing=False)
    except (NotImplementedError, RuntimeError, ValueError, AttributeError) as error:
        name = type(base).__name__
        raise ModelError(
            f"{base.name_or_path}: {name} cannot be resized for new tokens ({error}); use infer.py or "
            "softprompt.SoftPromptModel"
        ) from None
    base.requires_grad_(False)


@torch.no_grad()
def _logits(base: PreTrainedModel, prompt: Tensor, ids: Tensor) -> Tensor:
    """Return the logits [T, V] at the tokens `ids` ([T], int64) after a prompt [P, H]."""
    row = ids.unsqueeze(0)
    logits, _ = padded_forward(base, prompt, Batch(row, torch.ones_like(row), torch.full_like(row, -100)))
    return logits[0, prompt.shape[0] :]


def _check_same(base: PreTrainedModel, wanted: Tensor, found: Tensor) -> None:
    off = (wanted - found).abs().max().item()
    if not off <= TOLERANCE * max(1.0, wanted.abs().max().item()):
        raise ModelError(
            f"{base.name_or_path}: {type(base).__name__} does more with a token than look up its embedding "
            f"(logits differ by {off:.2g}), so the prompt cannot be stored as tokens; use infer.py or "
            "softprompt.SoftPromptModel"
        )
