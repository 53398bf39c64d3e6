"""The cross-entropy of a linear language model head, fused with the head.

`projected_cross_entropy` takes hidden states and the head, and computes the logits of one block of the vocabulary at a
time. It returns a sum over targets, so that the caller can divide it by the number of targets of a whole optimizer step
or evaluation.
"""

from typing import Any

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
    others, _ = _attend_to_others(hidden, head, targets, target_rows, False)
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
        others, mean = _attend_to_others(hidden, head, targets, target_rows, ctx.needs_input_grad[0])  # [n], [n, H]
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


def _attend_to_others(
    hidden: Tensor, head: Tensor, targets: Tensor, target_rows: Tensor, with_mean: bool
) -> tuple[Tensor, Tensor | None]:
    """For each hidden state, reduce the logits and the rows of all words except its target, block by block.

    Args:
        hidden: [n, H]; head: [V, H]; targets: [n] int64.
        target_rows: The head's rows of the targets [n, H] in the wide dtype.
    Returns:
        The log-sum-exp of the other words' logits [n], and the mean of their rows of the head under the softmax of
        these logits [n, H] (None unless `with_mean`), both in the wide dtype.
    """
    n, V, wide = len(hidden), len(head), target_rows.dtype
    width = max(1, min(V, BLOCK_ELEMENTS[hidden.device.type] // max(1, n)))
    maximum = target_rows.new_full((n, 1), torch.finfo(wide).min)
    total, mean_total = target_rows.new_zeros((n, 1)), target_rows.new_zeros((n, 1))
    mean = torch.zeros_like(target_rows) if with_mean else None
    for start in range(0, V, width):
        block = head[start : start + width]  # [b, H]
        logits = (hidden @ block.T).to(wide)  # [n, b]
        at = (targets - start).clamp(0, len(block) - 1)[:, None]  # [n, 1]: the target's index in this block, clamped
        here = (at[:, 0] + start == targets)[:, None]
        logits.scatter_(1, at, logits.gather(1, at).masked_fill(here, -torch.inf))
        higher = torch.maximum(maximum, logits.amax(1, keepdim=True))
        shrink = (maximum - higher).exp_()  # [n, 1]
        weights = logits.sub_(higher).exp_()  # [n, b]
        weight_sum = weights.sum(1, keepdim=True)  # [n, 1]
        total = total * shrink + weight_sum
        if mean is not None:
            added = _add_weighted_rows(mean.mul_(shrink), weights, weight_sum, block, target_rows)
            mean_total = mean_total * shrink + added
        maximum = higher
    return (maximum + total.log())[:, 0], mean.div_(mean_total) if mean is not None else None


def _add_weighted_rows(into: Tensor, weights: Tensor, weight_sum: Tensor, block: Tensor, target_rows: Tensor) -> Tensor:
    """Add the weighted sum of a block's rows to `into`.

    The caller finally subtracts the target's row from the mean of all blocks. If the head's dtype is narrower than the
    wide dtype, the product here starts from −(Σ weights) · target row: so the small difference is rounded to the narrow
    dtype, and not the sum, which may be far larger. In fp16 the sum could also overflow, so the weights are scaled
    until their sum is at most `FP16_MAX_WEIGHT`.

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
    start = (target_rows * -weight_sum).to(block.dtype)  # [n, H]
    difference = torch.addmm(start, weights, block)
    if factor is None:
        into.add_(difference).sub_(start)
        return weight_sum
    into.add_(difference / factor).sub_(start / factor)
    return weight_sum / factor


def _wide(hidden: Tensor) -> torch.dtype:
    """Return the wide dtype: fp32, or fp64 if `hidden` is fp64."""
    return torch.promote_types(hidden.dtype, torch.float32)
