"""The end of a forward pass: compute the loss from final hidden states, for any base (`split_base` finds its head).

If the base's logits are hidden · headᵀ, the head is fused with the loss (`linear_cross_entropy`). Otherwise, for
example if logits are soft-capped, scaled or have a bias, the base's own code computes the logits of one chunk of
positions at a time.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from softprompt.engines.linear_cross_entropy import (
    BLOCK_ELEMENTS,
    projected_cross_entropy,
    projected_divergence,
    projected_divergences,
    projected_losses,
    projected_teacher,
)
from softprompt.models.loading import word_embeddings
from softprompt.models.precision import autocast, is_half
from softprompt.models.quantization import holds_quantized
from softprompt.utils.errors import ModelError

CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 27}  # logits that a `ModelHead` computes at a time


class TeacherPredictions(NamedTuple):
    """The predictions of a teacher at n positions, from `Head.teacher`.

    Attributes:
        vectors: What the same head's `divergence` needs, [n, H] in the wide dtype: for a `LinearHead`, the mean of the
            head's rows under the teacher's probabilities; for a `ModelHead`, the teacher's final hidden states.
        entropies: The entropy of the teacher's probabilities in nats, [n] in the wide dtype.
        top: The token that is most likely, [n] int64.
    """

    vectors: Tensor
    entropies: Tensor
    top: Tensor


class Head(Protocol):
    """Computes losses of final hidden states: the cross-entropy of targets, and the divergence from a teacher. The head
    is frozen; only the hidden states get a gradient.

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

    def teacher(self, hidden: Tensor) -> TeacherPredictions:
        """Return the predictions of a teacher with the final hidden states [n, H]."""
        ...

    def divergence(self, hidden: Tensor, teacher: TeacherPredictions) -> Tensor:
        """Return the sum of KL(teacher ‖ student) over n positions in nats, a scalar; `hidden` [n, H] are the student's
        final hidden states."""
        ...

    def divergences(self, hidden: Tensor, teacher: TeacherPredictions) -> tuple[Tensor, Tensor]:
        """Return the n terms of `divergence`, without a gradient, [n]; and the student's most likely tokens, [n]
        int64."""
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

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of n positions: [n, H] → [n, V], in the dtype of `weight`."""
        return hidden.to(self.weight.dtype) @ self.weight.T

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return projected_cross_entropy(hidden.to(self.weight.dtype), self.weight, targets)

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return projected_losses(hidden.to(self.weight.dtype), self.weight, targets)

    def teacher(self, hidden: Tensor) -> TeacherPredictions:
        return TeacherPredictions(*projected_teacher(hidden.to(self.weight.dtype), self.weight))

    def divergence(self, hidden: Tensor, teacher: TeacherPredictions) -> Tensor:
        return projected_divergence(hidden.to(self.weight.dtype), self.weight, teacher.vectors, teacher.entropies)

    def divergences(self, hidden: Tensor, teacher: TeacherPredictions) -> tuple[Tensor, Tensor]:
        return projected_divergences(hidden.to(self.weight.dtype), self.weight, teacher.vectors, teacher.entropies)

    def working_bytes(self, n: int) -> int:
        return 3 * 4 * min(BLOCK_ELEMENTS[self.weight.device.type], n * len(self.weight))


def in_dtype(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a frozen weight in `dtype`, detached: itself, or a copy that all heads of the base share."""
    if weight.dtype is dtype:
        return weight.detach()
    if weight.is_inference():  # it has no version
        return weight.detach().to(dtype)
    state, copy = _copies.get(weight, (None, None))
    if copy is None or copy.dtype is not dtype or state != (weight._version, weight.data_ptr()):
        copy = weight.detach().to(dtype)
        _copies[weight] = (weight._version, weight.data_ptr()), copy
    return copy


_copies = WeakTensorKeyDictionary()


class ModelHead:
    """A head that uses the base's own code: it runs the base's forward with the body replaced by a stand-in that
    returns the given hidden states.

    Args:
        parent: The module that contains the body.
        name: The name of the attribute of `parent` that is the body.

    Attributes:
        weight: In half precision, a copy of the output layer's weight in the compute dtype if that weight is fp32, as
            when it is tied to the embeddings; else None. Without the copy, autocast would convert it at each call.
    """

    def __init__(self, base: PreTrainedModel, parent: nn.Module, name: str, compute_dtype: torch.dtype):
        self.base, self.parent, self.name, self.compute_dtype = base, parent, name, compute_dtype
        self.body: nn.Module = parent.get_submodule(name)
        self.output, self.weight = base.get_output_embeddings(), None
        is_plain = isinstance(self.output, nn.Linear) and not holds_quantized(self.output)
        if is_half(compute_dtype) and is_plain and self.output.weight.dtype is torch.float32:
            self.weight = nn.Parameter(in_dtype(self.output.weight, compute_dtype), requires_grad=False)
        self.nbytes = 0 if self.weight is None else self.weight.nbytes
        self.device, self.V = word_embeddings(base).weight.device, word_embeddings(base).num_embeddings

    def logits(self, hidden: Tensor, wide: bool = False) -> Tensor:
        """Return the logits of n positions: [n, H] → [n, V], at least fp32.

        Args:
            wide: Compute the output layer in fp32 if its weight is fp32. In half precision, many logits are equal after
                rounding, so the most likely word would be arbitrary.

        Raises:
            ModelError: The base's forward does not call the body.
        """
        stand_in = self.parent._modules[self.name] = _Body(hidden[None], self.body)
        own = None if self.weight is None else self.output.weight
        try:
            if own is not None and wide:
                self.output.forward = partial(_linear_in_fp32, self.output)
            elif own is not None:
                self.output.weight = self.weight
            with autocast(self.device, self.compute_dtype):
                logits = self.base(inputs_embeds=hidden[None], use_cache=False).logits[0]
            if not stand_in.was_called:
                raise ModelError(f"its forward does not call {type(self.body).__name__}")
            return logits.to(torch.promote_types(logits.dtype, torch.float32))
        finally:
            self.parent._modules[self.name] = self.body
            if own is not None:
                self.output.weight = own
                self.output.__dict__.pop("forward", None)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return _ChunkedLoss.apply(hidden, targets, self, self._cross_entropies)

    @torch.no_grad()
    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        (found,) = self._in_chunks(lambda *chunk: (self._cross_entropies(*chunk),), hidden, targets)
        return found

    @torch.no_grad()
    def teacher(self, hidden: Tensor) -> TeacherPredictions:
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        return TeacherPredictions(wide, *self._in_chunks(self._entropies_and_top, wide))

    def divergence(self, hidden: Tensor, teacher: TeacherPredictions) -> Tensor:
        return _ChunkedLoss.apply(hidden, teacher.vectors, self, self._divergences)

    @torch.no_grad()
    def divergences(self, hidden: Tensor, teacher: TeacherPredictions) -> tuple[Tensor, Tensor]:
        terms, top = self._in_chunks(partial(self._divergences_and_top, wide=True), hidden, teacher.vectors)
        return terms, top

    def _cross_entropies(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(hidden), targets, reduction="none")

    def _divergences(self, hidden: Tensor, teacher: Tensor) -> Tensor:
        return self._divergences_and_top(hidden, teacher)[0]

    def _divergences_and_top(self, hidden: Tensor, teacher: Tensor, wide: bool = False) -> tuple[Tensor, Tensor]:
        """Return KL(teacher ‖ student) at each position, given the final hidden states of both [n, H], and the
        student's most likely tokens. For `wide` see `logits`."""
        with torch.no_grad():
            expected = self.logits(teacher.to(hidden.dtype), wide).log_softmax(-1)
        logs = self.logits(hidden, wide).log_softmax(-1)
        return F.kl_div(logs, expected, reduction="none", log_target=True).sum(-1), logs.detach().argmax(-1)

    def _entropies_and_top(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        logs = self.logits(hidden, wide=True).log_softmax(-1)
        return -(logs.exp() * logs).sum(-1), logs.argmax(-1)

    def _in_chunks(self, compute: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> Iterator[Tensor]:
        """Apply a function to chunks of `chunk` positions of tensors [n, …], and concatenate each of its results
        [n]."""
        found = [compute(*parts) for parts in zip(*(t.split(self.chunk) for t in tensors), strict=True)]
        return map(torch.cat, zip(*found, strict=True))

    @property
    def chunk(self) -> int:
        """The number of positions whose logits are computed at a time."""
        return max(1, CHUNK_ELEMENTS[self.device.type] // self.V)

    def working_bytes(self, n: int) -> int:
        return 5 * 4 * min(self.chunk, n) * self.V


def _linear_in_fp32(layer: nn.Linear, x: Tensor) -> Tensor:
    """Compute a linear layer whose weight is fp32, whatever the autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), layer.weight, None if layer.bias is None else layer.bias.float())


class _ChunkedLoss(torch.autograd.Function):
    """The sum of a loss over n positions. The forward pass also computes the gradient of each chunk of positions, so
    that only one chunk's logits are in memory at a time.

    `losses` computes the loss of each position from a chunk of `hidden` [n, H] and of `targets` [n, …].
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, head: ModelHead, losses: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        gradient = torch.zeros_like(hidden)
        for start in range(0, len(hidden), head.chunk):
            at = slice(start, start + head.chunk)
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                x = hidden[at].detach().requires_grad_(ctx.needs_input_grad[0])
                loss = losses(x, targets[at]).sum()
            if x.requires_grad:
                (gradient[at],) = torch.autograd.grad(loss, x)
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None, None


class _Body(nn.Module):
    """A stand-in for a base's body; its forward returns the given hidden states [1, n, H]. All other attributes are the
    body's: Falcon-H1 reads a scale of the logits from it."""

    def __init__(self, hidden: Tensor, body: nn.Module):
        super().__init__()
        self.hidden, self.was_called = hidden, False
        self.__dict__["replaced"] = body  # no submodule

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["replaced"], name)

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        self.was_called = True
        return _BodyOutput(last_hidden_state=self.hidden)


class _BodyOutput(BaseModelOutputWithPast):
    def __getattr__(self, name: str) -> None:
        """Fields of other output classes, such as `router_logits`, are None."""
        if name.startswith("__"):
            raise AttributeError(name)
