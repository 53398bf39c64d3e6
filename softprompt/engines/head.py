"""The end of a forward pass: compute the loss from final hidden states, for any base.

If the base's logits are hidden · headᵀ, the head is fused with the loss (`linear_cross_entropy`). Otherwise, for
example if logits are soft-capped, scaled or have a bias, the base's own code computes the logits of one chunk of
positions at a time.
"""

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from softprompt.engines.linear_cross_entropy import BLOCK_ELEMENTS, projected_cross_entropy, projected_losses
from softprompt.models.loading import word_embeddings
from softprompt.models.precision import autocast
from softprompt.models.quantization import holds_quantized
from softprompt.utils.errors import ModelError
from softprompt.utils.model_config import text_config
from softprompt.utils.out_of_memory import is_out_of_memory

PROBE_SIZE = 1000.0  # largest logit in the test with which `split_base` detects soft caps


class Head(Protocol):
    """Computes the loss of final hidden states. The head is frozen; only the hidden states get a gradient.

    Attributes:
        nbytes: Bytes that the head takes in addition to the base's own tensors.
    """

    nbytes: int

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of −log p(target) over n positions, a scalar.

        Args:
            hidden: The base's last hidden states, after its final norm, [n, H] of any float dtype.
            targets: [n] int64.
        """
        ...

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the n terms of `loss`, without a gradient: [n]."""
        ...

    def working_bytes(self, n: int) -> int:
        """Estimate the bytes that `loss` needs for n positions."""
        ...


class LinearHead:
    """A head without bias, whose output is the logits: hidden · weightᵀ.

    Args:
        weight: [V, H] in the compute dtype.
        nbytes: Bytes of `weight` if it is a copy; 0 if it is the base's own tensor.
    """

    def __init__(self, weight: Tensor, nbytes: int = 0):
        self.weight, self.nbytes = weight, nbytes

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return projected_cross_entropy(hidden.to(self.weight.dtype), self.weight, targets)

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return projected_losses(hidden.to(self.weight.dtype), self.weight, targets)

    def working_bytes(self, n: int) -> int:
        return 3 * 4 * min(BLOCK_ELEMENTS[self.weight.device.type], n * len(self.weight))


class ModelHead:
    """A head that uses the base's own code: it runs the base's forward with the body replaced by a stand-in that
    returns the given hidden states.

    Args:
        parent: The module that contains the body.
        name: The name of the attribute of `parent` that is the body.
    """

    nbytes = 0

    def __init__(self, base: PreTrainedModel, parent: nn.Module, name: str, compute_dtype: torch.dtype):
        self.base, self.parent, self.name, self.compute_dtype = base, parent, name, compute_dtype
        self.body: nn.Module = parent.get_submodule(name)
        self.device, self.V = word_embeddings(base).weight.device, word_embeddings(base).num_embeddings

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of n positions: [n, H] → [n, V], at least fp32."""
        self.parent._modules[self.name] = _Body(hidden[None])
        try:
            with autocast(self.device, self.compute_dtype):
                logits = self.base(inputs_embeds=hidden[None], use_cache=False).logits[0]
            return logits.to(torch.promote_types(logits.dtype, torch.float32))
        finally:
            self.parent._modules[self.name] = self.body

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return _ChunkedLoss.apply(hidden, targets, self)

    @torch.no_grad()
    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        chunks = zip(hidden.split(self.chunk), targets.split(self.chunk), strict=True)
        return torch.cat([F.cross_entropy(self.logits(x), t, reduction="none") for x, t in chunks])

    @property
    def chunk(self) -> int:
        """The number of positions whose logits are computed at a time."""
        return max(1, 8 * BLOCK_ELEMENTS[self.device.type] // self.V)

    def working_bytes(self, n: int) -> int:
        return 5 * 4 * min(self.chunk, n) * self.V


class _ChunkedLoss(torch.autograd.Function):
    """The autograd function of `ModelHead.loss`. Its forward pass also computes the gradient of each chunk, so that
    only one chunk's logits are in memory at a time."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: ModelHead) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        gradient = torch.zeros_like(hidden)
        for start in range(0, len(hidden), head.chunk):
            at = slice(start, start + head.chunk)
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                x = hidden[at].detach().requires_grad_(ctx.needs_input_grad[0])
                loss = F.cross_entropy(head.logits(x), targets[at], reduction="sum")
            if x.requires_grad:
                (gradient[at],) = torch.autograd.grad(loss, x)
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None


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
        hidden *= PROBE_SIZE / (hidden @ linear.weight.float().T).abs().max().clamp(min=1e-30)
    general, logits = _first_that_works(base, compute_dtype, hidden)
    if not is_linear or linear.bias is not None:
        return SplitBase(general.body, general)
    expected = hidden.to(compute_dtype) @ linear.weight.to(compute_dtype).T
    tolerance = 1e-4 if compute_dtype.itemsize >= 4 else 8e-3  # two roundings of bf16
    if (logits - expected.to(logits.dtype)).abs().max() > tolerance * PROBE_SIZE:
        return SplitBase(general.body, general)
    weight = linear.weight.detach().to(compute_dtype)
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


class _Body(nn.Module):
    """A stand-in for a base's body; its forward returns the given hidden states [1, n, H]."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        return _BodyOutput(last_hidden_state=self.hidden)


class _BodyOutput(BaseModelOutputWithPast):
    def __getattr__(self, name: str) -> None:
        """Fields of other output classes, such as `router_logits`, are None."""
        if name.startswith("__"):
            raise AttributeError(name)
