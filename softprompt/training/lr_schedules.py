"""Learning rate schedules: those of `transformers.get_scheduler`, under the same names.

They are implemented here because importing those of transformers also loads PEFT and bitsandbytes if they are
installed. That takes seconds, and prints warnings about kernels that the run does not use.
"""

import math
from collections.abc import Callable

from softprompt.config.train_args import TrainingArguments

POLYNOMIAL_END = 1e-7  # the learning rate at the end of `polynomial`


def learning_rates(args: TrainingArguments, peak: float, total: int) -> Callable[[int], float]:
    """Return the learning rate as a function of the optimizer step, counted from 0.

    Args:
        args: `lr_scheduler_type` and `warmup_steps`.
        peak: The largest learning rate.
        total: Number of optimizer steps of the run.
    """
    kind = args.lr_scheduler_type
    warmup = int(args.warmup_steps) if args.warmup_steps >= 1 else math.ceil(args.warmup_steps * total)
    after_warmup = max(1, total - warmup)

    def factor(step: int) -> float:
        if kind == "constant":
            return 1.0
        if step < warmup:
            return step / warmup
        done = (step - warmup) / after_warmup
        if kind == "linear":
            return max(0, total - step) / after_warmup
        if kind == "polynomial":  # of degree 1, transformers' default
            end = min(POLYNOMIAL_END, peak)
            return ((peak - end) * (1 - done) + end) / peak
        if kind in ("cosine", "cosine_with_restarts"):  # one cycle, transformers' default, so nothing restarts
            return 0.5 * (1 + math.cos(math.pi * done))
        return 1.0  # constant_with_warmup

    return lambda step: peak * factor(step)


def farthest_move(lr_at: Callable[[int], float], total: int) -> float:
    """Return the approximate maximum distance by which AdamW can move one value in `total` steps: the sum of the
    learning rates, because a step moves a value by at most about the learning rate."""
    stride = max(1, total // 10_000)
    return stride * sum(map(lr_at, range(0, total, stride)))
