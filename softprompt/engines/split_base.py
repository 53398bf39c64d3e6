"""Split a base into its body and its head."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt.engines.head import Head, LinearHead, ModelHead, in_dtype
from softprompt.models.loading import word_embeddings
from softprompt.models.quantization import holds_quantized
from softprompt.utils.errors import ModelError
from softprompt.utils.model_config import text_config
from softprompt.utils.out_of_memory import is_out_of_memory

PROBE_SIZE = 1000.0  # largest logit in the test with which `split_base` detects soft caps


class SplitBase(NamedTuple):
    """A base in two parts.

    Attributes:
        body: The module that computes the final hidden states (`last_hidden_state`) from `inputs_embeds`.
        head: Computes losses from the final hidden states.
    """

    body: nn.Module
    head: Head


@torch.no_grad()
def split_base(base: PreTrainedModel, compute_dtype: torch.dtype) -> SplitBase:
    """Split a base into its body and its head: a `LinearHead` if the base's logits are hidden · headᵀ, else a
    `ModelHead`.

    The body is the outermost `PreTrainedModel` within `base` for which `ModelHead` computes logits without an error.
    The head is tested on two random hidden states whose logits are so large that a soft cap or a scale changes them.

    Raises:
        ModelError: The base has no such body.
    """
    linear, device = base.get_output_embeddings(), word_embeddings(base).weight.device
    is_linear = isinstance(linear, nn.Linear) and not holds_quantized(linear)
    H = linear.in_features if is_linear else text_config(base.config).hidden_size
    hidden = torch.randn(2, H, generator=torch.Generator().manual_seed(0)).to(device)
    if is_linear:
        weight = in_dtype(linear.weight, compute_dtype)
        hidden *= PROBE_SIZE / (hidden.to(compute_dtype) @ weight.T).abs().max().clamp(min=1e-30)
    general, logits = _first_that_works(base, compute_dtype, hidden)
    if not is_linear or linear.bias is not None:
        return SplitBase(general.body, general)
    expected = hidden.to(compute_dtype) @ weight.T
    tolerance = 1e-4 if compute_dtype.itemsize >= 4 else 8e-3  # two roundings of bf16
    if (logits - expected.to(logits.dtype)).abs().max() > tolerance * PROBE_SIZE:
        return SplitBase(general.body, general)
    return SplitBase(general.body, LinearHead(weight, 0 if weight.dtype is linear.weight.dtype else weight.nbytes))


def _first_that_works(base: PreTrainedModel, dtype: torch.dtype, hidden: Tensor) -> tuple[ModelHead, Tensor]:
    """Return the `ModelHead` of the outermost body that can be replaced, and its logits [n, V] for `hidden` [n, H].

    Raises:
        ModelError: No body can be replaced.
    """
    reason = "it has no body"
    for name, module in base.named_modules():
        if name and isinstance(module, PreTrainedModel):
            parent, _, attribute = name.rpartition(".")
            head = ModelHead(base, base.get_submodule(parent), attribute, dtype)
            try:
                return head, head.logits(hidden)
            except Exception as error:  # the forward uses the body in another way
                if isinstance(error, RuntimeError) and is_out_of_memory(error):
                    raise
                reason = " ".join(str(error).split())[:200] or type(error).__name__
    raise ModelError(f"{base.name_or_path}: {type(base).__name__} cannot be split into a body and a head: {reason}")
