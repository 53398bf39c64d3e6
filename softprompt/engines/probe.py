"""A few tokens with which a base is checked, and the comparison of the logits that two ways of running it give."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.models.loading import word_embeddings

PROBE_TOKENS = 5
MASKED = -50.0  # log-probabilities below this are of words that the base masks, by -inf or a large negative number


def probe_ids(base: PreTrainedModel) -> Tensor:
    """Return a few token ids with which a base is checked, [1, T] int64 with T ≤ PROBE_TOKENS, on the base's device.
    Special tokens, which usually come first, are left out if there are enough others."""
    words = word_embeddings(base).weight
    first = max(0, min(8, len(words) - PROBE_TOKENS))
    return torch.arange(first, len(words))[:PROBE_TOKENS].to(words.device)[None]


def log_probability_error(logits: Tensor, expected: Tensor) -> tuple[float, float]:
    """Return by how much two tensors of logits [..., V] differ.

    Words that the expected logits mask must be masked in both; their own values do not matter, which would otherwise
    hide the differences of all others.

    Returns:
        The largest difference of two log-probabilities (infinite if a masked word is not masked in both, or a value is
        NaN), and the largest log-probability by absolute value.
    """
    ours, wanted = (each.double().log_softmax(-1) for each in (logits, expected))
    masked = wanted < MASKED
    size = wanted[~masked].abs().max().item()
    off = (ours - wanted)[~masked].abs().max().item()
    if ours[masked].gt(MASKED / 2).any() or off != off:
        return float("inf"), size
    return off, size
