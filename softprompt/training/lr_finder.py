"""`--find_learning_rate`: a short sweep before the run, on training rows alone, that picks the peak learning rate.

The prompt is trained from its first values at each of `RATES`, for a share of the run's steps and under the run's own
schedule squeezed into them; the better ones go on to a rung of more steps, and so on (successive halving, Jamieson and
Talwalkar 2016, arXiv:1502.07943). What is compared is the mean loss over training rows that were set aside. Rungs
that favour rates far apart say nothing of a run that is longer still, and then none is found. Everything follows from
the seed: the same run finds the same rate.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from softprompt.config.train_args import TrainingArguments
from softprompt.data.dataloader import ListLoader
from softprompt.data.tokenization import Example
from softprompt.distributed.process_group import StopSource
from softprompt.engines.base import Engine
from softprompt.prompt.soft_prompt import PromptEmbedding
from softprompt.training.loop import QuietCallbacks, train
from softprompt.utils.errors import NonFiniteError, Stopped

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
RUNGS = ((1 / 20, len(RATES)), (1 / 10, 3))  # share of the run's steps, and how many rates take part
LEAST_STEPS = 10  # of a rung
SET_ASIDE, MOST_ASIDE, FEWEST_ASIDE = 1 / 4, 256, 16  # training rows to compare by
LEAST_GAIN = 0.01  # of the loss before training; less is nothing found
TIE = 0.03  # of the lowest loss: a short run favours large rates, so of rates that are so close the smallest is taken
APART = 5  # times; neighbours among RATES are closer


@dataclass(frozen=True)
class Sweep:
    """What a sweep found: the rate, or None and why; and the loss after each rate's last rung (inf: not finite), by
    rate, beside that of the prompt's first values."""

    learning_rate: float | None
    why: str
    start: float
    losses: dict[float, float]


def sweep_steps(total: int) -> int:
    """Optimizer steps of a sweep before a run of `total`."""
    return sum(most * _steps(total, share) for share, most in RUNGS)


def find_learning_rate(
    engine: Engine,
    values: Tensor,
    examples: Sequence[Example],
    args: TrainingArguments,
    total: int,
    rows_per_step: int,
    request: StopSource,
    on_step: Callable[[], object] = lambda: None,
) -> Sweep:
    """values: [P, H] fp32, the prompt's first, which stay as they are; `total` are the steps of the run to come.
    `on_step` is called after every step of the sweep.

    Raises:
        Stopped: `request` came true.
        TrainingError: what would end the run at any rate, too: memory that runs out, a rank that dies.
    """
    held, rest = set_aside(examples, args.seed)
    if len(held) < FEWEST_ASIDE:
        why = f"{len(examples):,} rows are too few to set some aside and compare by them"
        return Sweep(None, why, math.nan, {})

    def loss_of(prompt: Tensor) -> float:
        loss, targets = engine.evaluate(prompt, held)
        return loss.item() / targets

    def loss_after(rate: float, steps: int) -> float:
        prompt, watch = PromptEmbedding(values).to(engine.device), QuietCallbacks(request, on_step)
        try:
            short = short_schedule(args, steps, total)
            train(engine, prompt, ListLoader(rest, short, rows_per_step), short, rate, watch)
        except NonFiniteError:
            return math.inf
        if watch.code is not None:
            raise Stopped("stopped while looking for a learning rate; the same command begins anew", watch.code)
        loss = loss_of(prompt.weight.detach())
        return loss if math.isfinite(loss) else math.inf

    start, losses, left = loss_of(values.to(engine.device)), {}, list(RATES)
    for share, most in RUNGS:
        left = sorted(left, key=lambda rate: losses.get(rate, 0.0))[:most]  # the best of the rung before is the first
        losses |= {rate: loss_after(rate, _steps(total, share)) for rate in left}
    lowest = min(losses[rate] for rate in left)
    if not lowest < start * (1 - LEAST_GAIN):
        return Sweep(None, "no rate lowered the loss within the sweep", start, losses)
    close = [rate for rate in left if losses[rate] <= lowest * (1 + TIE)]
    found, before = min(close), left[0]
    if before not in close and not 1 / APART < found / before < APART:
        why = f"its trials contradict each other: {before:g} was best in the shorter ones, {found:g} in the longer"
        return Sweep(None, why, start, losses)
    return Sweep(found, "", start, losses)


def set_aside(examples: Sequence[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """Those to compare by, drawn by the seed, and the rest to train on."""
    aside = min(MOST_ASIDE, int(len(examples) * SET_ASIDE))
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    return [examples[i] for i in order[:aside]], [examples[i] for i in order[aside:]]


def short_schedule(args: TrainingArguments, steps: int, total: int) -> TrainingArguments:
    """A run of `steps` under the schedule of one of `total`: a warm-up that is given in steps keeps its share."""
    warmup = args.warmup_steps if args.warmup_steps < 1 else min(0.99, args.warmup_steps / total)
    return replace(args, max_steps=steps, warmup_steps=warmup)


def _steps(total: int, share: float) -> int:
    return min(total, max(LEAST_STEPS, math.ceil(total * share)))
