"""AdamW over the prompt, and one step of it."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from softprompt.config.train_args import TrainingArguments
from softprompt.data.tokenization import Example, count_targets
from softprompt.engines.base import Engine
from softprompt.prompt.soft_prompt import PromptEmbedding


def make_optimizer(prompt: PromptEmbedding, args: TrainingArguments, peak: float) -> torch.optim.Optimizer:
    """Make a fused AdamW for the prompt, as Trainer's `adamw_torch_fused`."""
    betas = (args.adam_beta1, args.adam_beta2)
    return torch.optim.AdamW(
        [prompt.weight], lr=peak, betas=betas, eps=args.adam_epsilon, weight_decay=args.weight_decay, fused=True
    )


def optimizer_step(
    engine: Engine,
    prompt: PromptEmbedding,
    window: Sequence[Example],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    max_grad_norm: float,
) -> tuple[float, float, bool]:
    """Take one step along the clipped gradient of the window's mean loss (`max_grad_norm` 0: no clipping).

    Returns:
        The mean loss, the gradient norm before clipping, and whether the step was taken: a GradScaler skips a step
        whose fp16 gradient overflowed.
    """
    n_targets = sum(map(count_targets, window))
    one = torch.ones((), device=engine.device)
    loss_sum, _ = engine.accumulate(prompt, window, scaler.scale(one) / n_targets)
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_([prompt.weight], max_grad_norm or math.inf)
    scale_before = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss_sum.item() / n_targets, norm.item(), scaler.get_scale() >= scale_before
