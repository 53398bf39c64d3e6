"""AdamW over the prompt, or over the parameters of its reparameterization: one step of it, and its saved state."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from softprompt.config.train_args import TrainingArguments
from softprompt.data.tokenization import Example, count_targets
from softprompt.engines.base import Engine
from softprompt.prompt.soft_prompt import PromptEmbedding


def make_optimizer(prompt: PromptEmbedding, args: TrainingArguments, peak: float) -> torch.optim.Optimizer:
    """Make a fused AdamW for the prompt's trained parameters, as Trainer's `adamw_torch_fused`."""
    betas, trained = (args.adam_beta1, args.adam_beta2), list(prompt.trained_parameters().values())
    return torch.optim.AdamW(
        trained, lr=peak, betas=betas, eps=args.adam_epsilon, weight_decay=args.weight_decay, fused=True
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer, prompt: PromptEmbedding) -> dict[str, Tensor]:
    """Return AdamW's moments and step counts by name: "exp_avg" for the prompt itself, "embedding.exp_avg" for a
    parameter with a name."""
    return {
        f"{name}.{key}".lstrip("."): tensor
        for name, parameter in prompt.trained_parameters().items()
        for key, tensor in optimizer.state[parameter].items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, prompt: PromptEmbedding, tensors: Mapping[str, Tensor]) -> None:
    """Set the state of a new optimizer to what `optimizer_tensors` has returned."""
    trained = prompt.trained_parameters()
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition(".")
        optimizer.state[trained[name]][key] = tensor.to(trained[name].device)


def optimizer_bytes(prompt: PromptEmbedding) -> int:
    """Return the memory of the trained parameters, their gradients and AdamW's two moments, all in fp32."""
    return 4 * sum(p.numel() * p.element_size() for p in prompt.trained_parameters().values())


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
        The mean loss, the norm of the trained parameters' gradient before clipping, and whether the step was taken: a
        GradScaler skips a step whose fp16 gradient overflowed.
    """
    n_targets = sum(map(count_targets, window))
    one = torch.ones((), device=engine.device)
    loss_sum, _ = engine.accumulate(prompt, window, scaler.scale(one) / n_targets)
    prompt.backward()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(list(prompt.trained_parameters().values()), max_grad_norm or math.inf)
    scale_before = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    prompt.fold()
    optimizer.zero_grad(set_to_none=True)
    return loss_sum.item() / n_targets, norm.item(), scaler.get_scale() >= scale_before
