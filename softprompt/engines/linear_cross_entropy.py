"""The loss: a sum of token cross-entropies, so that it can be normalised over a whole optimizer step or evaluation."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FP16_MASS = 16  # of weights in a block: its products fit into fp16 up to entries of the head of 2,000
BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 27}  # of the logits that exist at a time; on the CPU they stay in cache


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over targets of −log p(label), an fp32 scalar.

    Position t predicts label t + 1, as in transformers' causal language model loss; labels of -100 are no targets.

    Args:
        logits: [B, T, V], any float dtype; the cross-entropy is taken in fp32.
        labels: [B, T] int64.
    """
    targets = labels[:, 1:].flatten()  # [B·(T-1)]
    scores = logits[:, :-1].flatten(0, 1).float()  # [B·(T-1), V]
    return F.cross_entropy(scores, targets, ignore_index=-100, reduction="sum")


def projected_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Sum over n targets of −log softmax(hidden · headᵀ)[target], a scalar; the logits [n, V] never exist as a whole.

    Args:
        hidden: [n, H] in the compute dtype; targets: [n] int64.
        head: [V, H] in the compute dtype, frozen: it gets no gradient.
    """
    return _ProjectedCrossEntropy.apply(hidden, head, targets)


@torch.no_grad()
def projected_losses(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """The same without the sum and without a gradient: [n] in the wide dtype (fp32, or fp64 under fp64)."""
    own = head[targets].to(_wide(hidden))  # [n, H]
    others, _ = _attend_to_others(hidden, head, targets, own, False)
    return F.softplus(others - (hidden.to(own.dtype) * own).sum(1))


class _ProjectedCrossEntropy(torch.autograd.Function):
    """The gradient is taken in the forward pass, with the blocks of logits at hand.

    With the target t set apart from the other words, whose log-sum-exp is o: −log p(t) = softplus(o − l_t), and its
    gradient is σ(o − l_t) · (E_{v ≠ t}[w_v] − w_t). The expectation is attention of the hidden states over the other
    rows of the head, with the running maximum of online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867). That
    nothing is subtracted from 1 keeps it exact where the target is almost certain.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        own = head[targets].to(_wide(hidden))  # [n, H]
        others, expected = _attend_to_others(hidden, head, targets, own, ctx.needs_input_grad[0])  # [n], [n, H]
        margin = others - (hidden.to(own.dtype) * own).sum(1)  # [n]
        if expected is not None:
            ctx.save_for_backward(expected.sub_(own).mul_(margin.sigmoid()[:, None]))  # wide: it is yet to be scaled
            ctx.dtype = hidden.dtype
        return F.softplus(margin).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors  # [n, H]
        return (gradient * grads[0]).to(ctx.dtype), None, None


def _attend_to_others(
    hidden: Tensor, head: Tensor, targets: Tensor, own: Tensor, with_mean: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-sum-exp [n] of each row's logits but the target's, and the mean [n, H] of the head's rows under their softmax
    (None unless it is asked for), both in the wide dtype, as `own` [n, H], the targets' rows; words pass block by
    block."""
    n, words = len(hidden), len(head)
    width = max(1, min(words, BLOCK_ELEMENTS[hidden.device.type] // max(1, n)))
    maximum = own.new_full((n, 1), torch.finfo(own.dtype).min)
    total, mass = own.new_zeros((n, 1)), own.new_zeros((n, 1))
    mean = torch.zeros_like(own) if with_mean else None
    for start in range(0, words, width):
        block = head[start : start + width]  # [b, H]
        logits = (hidden @ block.T).to(own.dtype)  # [n, b]
        at = (targets - start).clamp(0, len(block) - 1)[:, None]  # [n, 1]: where the target is, if it is in this block
        here = (at[:, 0] + start == targets)[:, None]
        logits.scatter_(1, at, logits.gather(1, at).masked_fill(here, -torch.inf))
        higher = torch.maximum(maximum, logits.amax(1, keepdim=True))
        shrink = (maximum - higher).exp_()  # [n, 1]
        weights = logits.sub_(higher).exp_()  # [n, b]
        weight = weights.sum(1, keepdim=True)  # [n, 1]
        total = total * shrink + weight
        if mean is not None:
            mass = mass * shrink + _add_weighted_sum(mean.mul_(shrink), weights, weight, block, own)
        maximum = higher
    return (maximum + total.log())[:, 0], mean.div_(mass) if mean is not None else None


def _add_weighted_sum(into: Tensor, weights: Tensor, weight: Tensor, block: Tensor, own: Tensor) -> Tensor:
    """Add Σ_v weights_v · w_v over a block [b, H] of the head to `into` [n, H] (wide). Returns the sum of the weights
    [n, 1] that were used: of `weights` [n, b], which lie from 0 to 1 and sum to `weight` [n, 1], or in a narrow dtype
    of what they are rounded to, so that the mean of equal rows is that row.

    The mean is compared with the target's own row, so in a narrow dtype the product begins at −Σ weights · own: what is
    rounded is the difference, not a sum that may be far larger. In fp16 the sum might overflow; there the weights are
    made to sum to at most `FP16_MASS`.
    """
    if block.dtype is into.dtype:
        into.add_(weights @ block)
        return weight
    factor = (FP16_MASS / weight).clamp_(max=1) if block.dtype is torch.float16 else None  # [n, 1]
    weights = (weights if factor is None else weights * factor).to(block.dtype)
    weight = weights.sum(1, keepdim=True, dtype=into.dtype)
    begun = (own * -weight).to(block.dtype)  # [n, H]
    difference = torch.addmm(begun, weights, block)
    if factor is None:
        into.add_(difference).sub_(begun)
        return weight
    into.add_(difference / factor).sub_(begun / factor)
    return weight / factor


def _wide(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)
