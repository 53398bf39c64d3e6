"""Losses of a linear language model head, fused with the head: the cross-entropy, and the divergence from a teacher.

`projected_cross_entropy` and `projected_divergence` take hidden states and the head, and compute the logits of one
block of the vocabulary at a time. They return a sum over positions, so that the caller can divide it by the number of
targets of a whole optimizer step or evaluation.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# In fp16, the softmax weights of a block of the vocabulary are scaled so that their sum is at most this value. The
# weighted sum of the head's rows then does not overflow if the head's entries are below about 2,000.
FP16_MAX_WEIGHT = 16
BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 27}  # logits stored at a time; on the CPU, they fit into its cache


def projected_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Return the sum over n targets of −log softmax(hidden · headᵀ)[target], a scalar in the wide dtype (fp32, or fp64
    under fp64). The logits [n, V] are never stored as a whole.

    Args:
        hidden: Final hidden states at n positions that predict a target [n, H], in the compute dtype.
        head: The language model head [V, H] in the compute dtype, frozen: it gets no gradient.
        targets: The target of each position [n] int64.
    """
    return _ProjectedCrossEntropy.apply(hidden, head, targets)


@torch.no_grad()
def projected_losses(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Return the n terms of the sum that `projected_cross_entropy` computes, without a gradient: [n] in the wide
    dtype."""
    target_rows = head[targets].to(_wide(hidden))  # [n, H]
    others = _reduce_logits(hidden, head, targets, target_rows).log_sums
    return F.softplus(others - (hidden.to(target_rows.dtype) * target_rows).sum(1))


class _ProjectedCrossEntropy(torch.autograd.Function):
    """The autograd function of `projected_cross_entropy`. It computes the gradient in the forward pass, while a block's
    logits are available.

    Let l_t be the logit of the target t, o the log-sum-exp of the logits of all other words v, and w_v the rows of the
    head. Then −log p(t) = softplus(o − l_t), and its gradient with respect to the hidden state is
    σ(o − l_t) · (E_{v ≠ t}[w_v] − w_t). The expectation is the mean of the other rows under the softmax of their
    logits. It is computed block by block with online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867). No
    probability is subtracted from 1, so the gradient is exact even if the target is almost certain.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        target_rows = head[targets].to(_wide(hidden))  # [n, H]
        others, mean, _ = _reduce_logits(hidden, head, targets, target_rows, ctx.needs_input_grad[0])  # [n], [n, H]
        margin = others - (hidden.to(target_rows.dtype) * target_rows).sum(1)  # [n]
        if mean is not None:
            # Saved in the wide dtype, because the backward pass scales it.
            ctx.save_for_backward(mean.sub_(target_rows).mul_(margin.sigmoid()[:, None]))
            ctx.dtype = hidden.dtype
        return F.softplus(margin).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors  # [n, H]
        return (gradient * grads[0]).to(ctx.dtype), None, None


class ProjectedTeacher(NamedTuple):
    """The predictions of a teacher at n positions, in the form that `projected_divergence` needs.

    Attributes:
        mean_rows: The mean of the head's rows under the teacher's probabilities, [n, H] in the wide dtype.
        entropies: The entropy of these probabilities in nats, [n] in the wide dtype.
        top: The token that is most likely, [n] int64.
    """

    mean_rows: Tensor
    entropies: Tensor
    top: Tensor


@torch.no_grad()
def projected_teacher(hidden: Tensor, head: Tensor) -> ProjectedTeacher:
    """Return the predictions softmax(hidden · headᵀ) of a teacher at n positions. Products are in the wide dtype.

    Args:
        hidden: The teacher's final hidden states [n, H].
        head: The language model head [V, H].
    """
    wide = hidden.to(_wide(hidden))
    log_sums, mean_rows, top = _reduce_logits(wide, head, None, torch.zeros_like(wide), with_mean=True, with_top=True)
    assert mean_rows is not None and top is not None
    return ProjectedTeacher(mean_rows, log_sums - (wide * mean_rows).sum(1), top)


def projected_divergence(hidden: Tensor, head: Tensor, mean_rows: Tensor, entropies: Tensor) -> Tensor:
    """Return the sum over n positions of KL(teacher ‖ softmax(hidden · headᵀ)), a scalar in the wide dtype.

    Let z = hidden · headᵀ. With the teacher's probabilities p, KL = log-sum-exp(z) − E_p[z] − entropy(p), and E_p[z] is
    hidden · (mean row under p). So a teacher costs nothing here: its mean rows and entropies are computed once. The
    gradient with respect to a hidden state is (mean row under softmax(z)) − (mean row under p).

    Args:
        hidden: The student's final hidden states [n, H], in the compute dtype.
        head: The language model head [V, H] in the compute dtype, frozen: it gets no gradient.
        mean_rows, entropies: See `ProjectedTeacher`.
    """
    return _ProjectedDivergence.apply(hidden, head, mean_rows, entropies)


@torch.no_grad()
def projected_divergences(hidden: Tensor, head: Tensor, mean_rows: Tensor, entropies: Tensor) -> tuple[Tensor, Tensor]:
    """Return the n terms of the sum that `projected_divergence` computes, without a gradient, [n] in the wide dtype;
    and the most likely token at these positions, [n] int64 (of equal logits, the token with the lowest id).

    Products are in the wide dtype, as those of `projected_teacher`: a term may be far smaller than the rounding of a
    logit in bf16, and equal logits are rare.
    """
    wide = hidden.to(_wide(hidden))
    log_sums, _, top = _reduce_logits(wide, head, None, mean_rows, with_top=True)
    assert top is not None
    return log_sums - (wide * mean_rows).sum(1) - entropies, top


class _ProjectedDivergence(torch.autograd.Function):
    """The autograd function of `projected_divergence`. It computes the gradient in the forward pass, while a block's
    logits are available."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, mean_rows: Tensor, entropies: Tensor) -> Tensor:
        log_sums, mean, _ = _reduce_logits(hidden, head, None, mean_rows, ctx.needs_input_grad[0])
        if mean is not None:
            ctx.save_for_backward(mean.sub_(mean_rows))
            ctx.dtype = hidden.dtype
        return (log_sums - (hidden.to(mean_rows.dtype) * mean_rows).sum(1) - entropies).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors  # [n, H]
        return (gradient * grads[0]).to(ctx.dtype), None, None, None


class _Reduced(NamedTuple):
    """The result of `_reduce_logits` for n hidden states.

    Attributes:
        log_sums: The log-sum-exp of the logits, [n] in the wide dtype.
        mean: The mean of the head's rows under the softmax of the logits, [n, H] in the wide dtype; or None.
        top: The word with the largest logit, [n] int64; or None.
    """

    log_sums: Tensor
    mean: Tensor | None
    top: Tensor | None


def _reduce_logits(
    hidden: Tensor,
    head: Tensor,
    left_out: Tensor | None,
    near_rows: Tensor,
    with_mean: bool = False,
    with_top: bool = False,
) -> _Reduced:
    """For each hidden state, reduce the logits and the head's rows of all words, or of all but one, block by block.

    Args:
        hidden: [n, H]; head: [V, H].
        left_out: The word of each hidden state that is left out, [n] int64; None leaves out none.
        near_rows: A vector near the mean rows, [n, H] in the wide dtype; see `_add_weighted_rows`.
        with_mean, with_top: Whether to compute `mean` and `top`.
    """
    n, V, wide = len(hidden), len(head), near_rows.dtype
    elements = BLOCK_ELEMENTS[hidden.device.type]
    width = max(1, min(V, elements // max(1, n)))
    if head.dtype is not hidden.dtype:  # each block is copied
        width = max(1, min(width, elements // head.shape[1]))
    maximum = near_rows.new_full((n, 1), torch.finfo(wide).min)
    total, mean_total = near_rows.new_zeros((n, 1)), near_rows.new_zeros((n, 1))
    mean = torch.zeros_like(near_rows) if with_mean else None
    top = torch.zeros((n, 1), dtype=torch.int64, device=hidden.device) if with_top else None
    for start in range(0, V, width):
        block = head[start : start + width].to(hidden.dtype)  # [b, H]
        logits = (hidden @ block.T).to(wide)  # [n, b]
        if left_out is not None:
            at = (left_out - start).clamp(0, len(block) - 1)[:, None]  # [n, 1]: the word's index in this block, clamped
            here = (at[:, 0] + start == left_out)[:, None]
            logits.scatter_(1, at, logits.gather(1, at).masked_fill(here, -torch.inf))
        largest = logits.amax(1, keepdim=True)
        if top is not None:
            top = torch.where(largest > maximum, logits.argmax(1, keepdim=True) + start, top)
        higher = torch.maximum(maximum, largest)
        shrink = (maximum - higher).exp_()  # [n, 1]
        weights = logits.sub_(higher).exp_()  # [n, b]
        weight_sum = weights.sum(1, keepdim=True)  # [n, 1]
        total = total * shrink + weight_sum
        if mean is not None:
            added = _add_weighted_rows(mean.mul_(shrink), weights, weight_sum, block, near_rows)
            mean_total = mean_total * shrink + added
        maximum = higher
    return _Reduced(
        (maximum + total.log())[:, 0],
        None if mean is None else mean.div_(mean_total),
        None if top is None else top[:, 0],
    )


def _add_weighted_rows(into: Tensor, weights: Tensor, weight_sum: Tensor, block: Tensor, near_rows: Tensor) -> Tensor:
    """Add the weighted sum of a block's rows to `into`.

    The caller finally subtracts `near_rows` (the target's row, or the teacher's mean row) from the mean of all blocks.
    If the head's dtype is narrower than the wide dtype, the product here starts from −(Σ weights) · near row: so the
    small difference is rounded to the narrow dtype, and not the sum, which may be far larger. In fp16 the sum could
    also overflow, so the weights are scaled until their sum is at most `FP16_MAX_WEIGHT`.

    Args:
        into: [n, H] in the wide dtype, changed in place.
        weights: [n, b], between 0 and 1; weight_sum: their sum [n, 1].
        block: Rows of the head [b, H].
    Returns:
        The sum of the weights that were used [n, 1]. In a narrow dtype these are the rounded weights, so that the mean
        of identical rows is exactly that row.
    """
    if block.dtype is into.dtype:
        into.add_(weights @ block)
        return weight_sum
    factor = (FP16_MAX_WEIGHT / weight_sum).clamp_(max=1) if block.dtype is torch.float16 else None  # [n, 1]
    weights = (weights if factor is None else weights * factor).to(block.dtype)
    weight_sum = weights.sum(1, keepdim=True, dtype=into.dtype)
    start = (near_rows * -weight_sum).to(block.dtype)  # [n, H]
    difference = torch.addmm(start, weights, block)
    if factor is None:
        into.add_(difference).sub_(start)
        return weight_sum
    into.add_(difference / factor).sub_(start / factor)
    return weight_sum / factor


def _wide(hidden: Tensor) -> torch.dtype:
    """Return the wide dtype: fp32, or fp64 if `hidden` is fp64."""
    return torch.promote_types(hidden.dtype, torch.float32)
