"""A base whose vocabulary holds the prompt: P more words, whose embeddings are the virtual tokens and which are never
generated. What comes out is a model of the base's own class and needs none of our code.

BLOOM's layer norm of the word embeddings comes after them, and a prompt stands before it: rows go in as they are.

Under a tied head a new word's logit would be the product with a prompt's row, which is large and may win. So the head
is untied, and a new word gets a row of its own there. Let h = γ⊙z + β be the final layer norm's output: z sums to zero,
so the row k/γ has the constant logit k·Σ(β/γ), and k makes it hopeless unless that sum is (nearly) zero. Where it is,
or where the final norm is another one, the row is the mean of the other rows: its logit is the mean of theirs, which is
never above the largest, and by Jensen's inequality the word is no likelier than 1/V at any temperature.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt.data.collate import Batch
from softprompt.engines.padded import padded_forward
from softprompt.models.loading import check_not_quantised, word_embeddings
from softprompt.prompt.soft_prompt import EmbeddedWords
from softprompt.utils.errors import ModelError

HOPELESS = -1e4  # exp(-1e4 / temperature) is 0 in every dtype, and fp16 holds it
DEVIATIONS = 8  # of rounding errors, that a constant logit must survive
TOLERANCE = 1e-4  # of the largest logit: what two orders of the same sums may differ by


def to_plain(base: PreTrainedModel, prompt: Tensor, ids: list[int], dtype: torch.dtype) -> float | None:
    """Put a prompt [P, H] into `base`, in place, as the words `ids` (P consecutive ints), untie its head, and bring its
    weights to `dtype`. In fp32 the result is run: behind the new words it must give the logits that the base
    gave behind the prompt.

    Returns the new words' logit, or None where it is the mean of the other words'.

    Raises:
        ModelError: a base that is quantised, has no linear head or no words that can be added, or does something else
            with a word than to look up its row.
    """
    _check_kind(base)
    base.requires_grad_(False).eval().float()
    V = min(ids[0], word_embeddings(base).num_embeddings)  # known words; a base may have spare rows after them
    text = torch.arange(min(V, 8))
    wanted = _logits(base, prompt, text)
    _untie(base)
    _resize(base, max(word_embeddings(base).num_embeddings, ids[-1] + 1))
    words, head = word_embeddings(base).weight, _head(base)
    words[V : ids[0]] = 0  # ids that neither the base nor anyone's text has
    words[ids] = prompt.to(words) / _embedded_ones(base, ids)
    constant, row = _silent_row(base, dtype)
    if head.bias is not None:
        constant, row = HOPELESS, torch.zeros_like(words[0])
        head.bias[V : ids[-1] + 1] = HOPELESS
    head.weight[V : ids[-1] + 1] = head.weight[:V].mean(0) if row is None else row
    _check_same(base, wanted[:, :V], _logits(base, prompt[:0], torch.cat([torch.tensor(ids), text]))[len(ids) :, :V])
    base.to(dtype)  # type: ignore[arg-type]
    base.config.dtype = dtype
    return constant


def silent_row(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A row [H] fp32 of a head, exact in `dtype`, whose logit is HOPELESS whatever a final layer norm of `weight` γ and
    `bias` β, [H] both, puts out; None where Σ(β/γ) is too near to zero for that.

    Rounding is counted in: the row's own moves the logit by v·z for v = γ⊙row less its mean, the rounding of h by
    some |row|·|h|·2^-mantissa; both as if their terms had independent signs.
    """
    gamma, beta = weight.to(dtype).double(), bias.to(dtype).double()
    row = (1 / gamma) * (HOPELESS / (beta / gamma).sum())
    row = row.to(dtype).double()
    across = gamma * row
    error = torch.finfo(dtype).eps / 2 * torch.sqrt(across.square().sum() + (row * beta).square().sum())
    spread = (across - across.mean()).norm() + error
    if not row.isfinite().all() or row @ beta + DEVIATIONS * spread > HOPELESS / 2:
        return None
    return row.float()


def _silent_row(base: PreTrainedModel, dtype: torch.dtype) -> tuple[float | None, Tensor | None]:
    """`silent_row` where the head reads a layer norm `ln_f`, as in BLOOM, GPT-2 and Falcon."""
    norm = getattr(base.base_model, "ln_f", None)
    if not isinstance(norm, nn.LayerNorm) or norm.bias is None or norm.weight.shape[0] != _head(base).in_features:
        return None, None
    row = silent_row(norm.weight, norm.bias, dtype)
    return (None if row is None else HOPELESS), row


def _check_kind(base: PreTrainedModel) -> None:
    check_not_quantised(base)
    name, head = type(base).__name__, base.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ModelError(f"{base.name_or_path}: {name} has no linear head of its own; no words can be added to it")


def _embedded_ones(base: PreTrainedModel, ids: list[int]) -> Tensor:
    """What the embedding module makes of rows of ones, [P, H]: 1, or a factor such as Gemma's √H, by which a prompt's
    rows are divided so that the module gives the prompt back. `_check_same` refuses a module that does not scale."""
    word_embeddings(base).weight[ids] = 1
    return EmbeddedWords(base)[torch.tensor(ids)]


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
        raise ModelError(f"{base.name_or_path}: {type(base).__name__} takes no new words: {error}") from None
    base.requires_grad_(False)


@torch.no_grad()
def _logits(base: PreTrainedModel, prompt: Tensor, ids: Tensor) -> Tensor:
    """Logits [T, V] at the T places of `ids` (int64) behind a prompt [P, H]."""
    row = ids.unsqueeze(0)
    logits, _ = padded_forward(base, prompt, Batch(row, torch.ones_like(row), torch.full_like(row, -100)))
    return logits[0, prompt.shape[0] :]


def _check_same(base: PreTrainedModel, wanted: Tensor, found: Tensor) -> None:
    off = (wanted - found).abs().max().item()
    if not off <= TOLERANCE * max(1.0, wanted.abs().max().item()):
        raise ModelError(
            f"{base.name_or_path}: {type(base).__name__} does more with a word than look up its row (logits off by "
            f"{off:.2g}), so its prompt cannot become words; use infer.py or softprompt.SoftPromptModel"
        )
