"""The loss: a sum of token cross-entropies, so that it can be normalised over a whole optimizer step or evaluation."""

import torch.nn.functional as F
from torch import Tensor


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
