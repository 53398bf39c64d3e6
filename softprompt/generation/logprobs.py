"""Log-probabilities of the tokens of an answer, and of the most likely alternatives at each position."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class TokenLogprob(NamedTuple):
    """A token, its log-probability in nats, and the most likely tokens at its position with theirs, in this order."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@torch.inference_mode()
def token_logprobs(
    logits: Tensor, tokens: Sequence[int], top_logprobs: Sequence[int | None]
) -> list[TokenLogprob | None]:
    """Return the log-probability of each chosen token under the model's own distribution, that is before temperature,
    top-p and the other settings of sampling.

    Args:
        logits: [n, V] of any float dtype.
        tokens: The n chosen tokens.
        top_logprobs: For each row the number of alternatives, which may be 0; None if the row needs no
            log-probabilities.

    Returns:
        One for each row; None where `top_logprobs` is None.
    """
    rows = [row for row, number in enumerate(top_logprobs) if number is not None]
    found: list[TokenLogprob | None] = [None] * len(tokens)
    if not rows:
        return found
    scores = logits[torch.tensor(rows, device=logits.device)].float().log_softmax(-1)  # [rows, V]
    chosen = scores.gather(1, torch.tensor([[tokens[row]] for row in rows], device=scores.device))[:, 0].tolist()
    most = min(max(top_logprobs[row] or 0 for row in rows), scores.shape[1])
    values, ids = (t.tolist() for t in scores.topk(most))
    for at, row in enumerate(rows):
        number = top_logprobs[row] or 0
        top = list(zip(ids[at][:number], values[at][:number], strict=True))
        found[row] = TokenLogprob(tokens[row], chosen[at], top)
    return found
