"""Split a base into its body and its head, and check the split on a few tokens."""

import copy
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from softprompt.engines.head import LinearHead, ModelHead, in_dtype
from softprompt.engines.probe import log_probability_error, probe_ids
from softprompt.models.loading import word_embeddings
from softprompt.models.precision import autocast
from softprompt.models.quantization import holds_quantized
from softprompt.utils.errors import ModelError
from softprompt.utils.out_of_memory import reason_or_raise

PROBE_SIZE = 1000.0  # largest logit in the test with which `_linear_head` detects soft caps and scales
PROBE_ROWS = 256  # number of the head's rows in that test


class SplitBase(NamedTuple):
    """A base in two parts.

    Attributes:
        body: The module that computes the final hidden states (`last_hidden_state`) from `inputs_embeds`.
        head: Computes losses from the final hidden states.
    """

    body: nn.Module
    head: LinearHead | ModelHead


@torch.no_grad()
def split_base(base: PreTrainedModel, compute_dtype: torch.dtype) -> SplitBase:
    """Split a base into its body and its head: a `LinearHead` if the base's logits are hidden · headᵀ, else a
    `ModelHead`.

    The body is the outermost `PreTrainedModel` within `base` that passes `_check` with a head.

    Raises:
        ModelError: The base has no such body.
    """
    reason = "it has no body"
    for name, module in base.named_modules():
        if name and isinstance(module, PreTrainedModel):
            parent, _, attribute = name.rpartition(".")
            general = ModelHead(base, base.get_submodule(parent), attribute, compute_dtype)
            for head in filter(None, (_linear_head(general), general)):
                try:
                    _check(base, SplitBase(module, head), compute_dtype, name)
                    return SplitBase(module, head)
                except Exception as error:  # the forward uses the body in another way
                    reason = reason_or_raise(error)
    raise ModelError(f"{base.name_or_path}: {type(base).__name__} cannot be split into a body and a head: {reason}")


def _linear_head(head: ModelHead) -> LinearHead | None:
    """Return the `LinearHead` that computes the logits of `head`; None if there is none.

    The test uses a few rows of the output layer, and hidden states whose largest logit is so large that a soft cap
    changes it. It runs in at least fp32, where a scale near 1 differs from rounding.
    """
    linear = head.output
    if not isinstance(linear, nn.Linear) or holds_quantized(linear) or linear.bias is not None:
        return None
    weight = in_dtype(linear.weight, head.compute_dtype)
    rows = weight[:PROBE_ROWS].to(torch.promote_types(weight.dtype, torch.float32))
    hidden = torch.randn(2, rows.shape[1], generator=torch.Generator().manual_seed(0)).to(rows)
    hidden *= PROBE_SIZE / (hidden @ rows.T).abs().max().clamp(min=1e-30)
    exact = copy.copy(head)
    exact.compute_dtype, exact.weight = rows.dtype, nn.Parameter(rows, requires_grad=False)
    try:
        off = (exact.logits(hidden) - hidden @ rows.T).abs().max().item()
    except Exception as error:  # for example, there are other modules between body and output layer
        reason_or_raise(error)
        return None
    if not off <= 1e-4 * PROBE_SIZE:
        return None
    return LinearHead(weight, 0 if weight.dtype is linear.weight.dtype else weight.nbytes)


def _check(base: PreTrainedModel, split: SplitBase, compute_dtype: torch.dtype, name: str) -> None:
    """Check that body and head together give the log-probabilities of the base's own forward for a few tokens. A split
    that passed is not checked again. A base whose own forward gives NaN cannot be checked; training reports the loss.

    The body is the same in both cases, so only the head's roundings can differ, also in half precision.

    Args:
        name: The name of the body within the base.

    Raises:
        ModelError: The log-probabilities differ.
    """
    passed, kind = _passed.setdefault(base, set()), (name, compute_dtype, type(split.head))
    if kind in passed:
        return
    ids = probe_ids(base)
    words, others = word_embeddings(base)(ids), {"attention_mask": torch.ones_like(ids), "use_cache": False}
    with autocast(ids.device, compute_dtype):
        own = base(inputs_embeds=words.clone(), **others).logits[0]  # CTRL scales them in place
        hidden = split.body(inputs_embeds=words, **others).last_hidden_state[0]
    if own.double().log_softmax(-1).isnan().any():
        return
    off, size = log_probability_error(split.head.logits(hidden), own)
    if off > max(1e-4, 4 * torch.finfo(compute_dtype).eps) * size:
        raise ModelError(f"the log-probabilities of the two differ from those of its own forward by up to {off:.2g}")
    passed.add(kind)


_passed: WeakKeyDictionary[PreTrainedModel, set[tuple[str, torch.dtype, type]]] = WeakKeyDictionary()
