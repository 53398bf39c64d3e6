"""The loop: windows of rows through an engine, one AdamW step each, with logging, evaluation and saving at their steps.

What it computes is what Trainer computes with the same arguments: the same order of rows, the loss normalised over the
targets of the whole optimizer step, the same schedule, clipping and AdamW.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from softprompt.batching import steps_per_epoch, windows
from softprompt.config import TrainingArguments
from softprompt.data import Example, count_targets
from softprompt.errors import TrainingError
from softprompt.model import Engine
from softprompt.prompt import PromptEmbedding

Metrics = dict[str, Any]
LEAST_SCALE = 1e-4  # of a GradScaler: gradients that overflow even then are no matter of scale
NAMED = 64  # rows of a step that its error names


@dataclass(frozen=True)
class Step:
    """One optimizer step, counted from 1: mean loss over its targets, gradient norm before clipping, the learning rate
    it used, its real tokens and seconds. `epoch` is the number of passes done, as a fraction."""

    number: int
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class TrainingState:
    """Where the loop stands after `step` optimizer steps, of which `taken` moved the schedule: what it needs to go on
    as if it had not stopped. `optimizer` holds AdamW's moments [P, H] fp32 and its step count; the order of the rows
    follows from seed and step. `rng` holds the states of torch's generators (uint8), by device type."""

    step: int = 0
    taken: int = 0
    unlogged: Sequence[Step] = ()
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)
    scaler: Mapping[str, Any] = field(default_factory=dict)
    rng: Mapping[str, Tensor] = field(default_factory=dict)


class Callbacks(Protocol):
    """What the loop calls, and never looks into."""

    def on_step(self, step: Step) -> None: ...
    def on_log(self, metrics: Metrics) -> None: ...

    def on_evaluate(self, step: Step) -> bool:
        """Whether the prompt, as it is, is to be saved."""
        ...

    def on_save(self, step: Step, state: TrainingState) -> None: ...

    def wants_to_stop(self) -> bool:
        """Read once a step, in one place: where several ranks train together, they add up their wishes there, and all
        stop after the same step."""
        ...


def rows_of_a_step(args: TrainingArguments, devices: int = 1) -> int:
    """Rows of an optimizer step: devices × batch × accumulation, as TrainingArguments means them."""
    return devices * args.per_device_train_batch_size * args.gradient_accumulation_steps


def total_steps(n_examples: int, args: TrainingArguments, rows_per_step: int | None = None) -> int:
    """Optimizer steps T of a run: `max_steps`, else ceil(epochs × windows per epoch), as in Trainer."""
    per_epoch = steps_per_epoch(n_examples, rows_per_step or rows_of_a_step(args))
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)


def epochs_done(step: int, n_examples: int, args: TrainingArguments, rows_per_step: int) -> float:
    """Passes over the rows after this many optimizer steps, counted in micro-batches, as Trainer logs them."""
    micro = math.ceil(n_examples * args.gradient_accumulation_steps / rows_per_step)
    whole, part = divmod(step, math.ceil(micro / args.gradient_accumulation_steps))
    return whole + min(part * args.gradient_accumulation_steps, micro) / micro


def learning_rates(args: TrainingArguments, peak: float, total: int) -> Callable[[int], float]:
    """The learning rate at the 0-based optimizer step, as a pure function; shapes are transformers.get_scheduler's."""
    from transformers import get_scheduler

    warmup = args.warmup_steps if args.warmup_steps >= 1 else math.ceil(args.warmup_steps * total)
    stand_in = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=peak)
    scheduler = get_scheduler(args.lr_scheduler_type, stand_in, int(warmup), total)
    return lambda step: peak * scheduler.lr_lambdas[0](step)


def farthest_move(lr_at: Callable[[int], float], total: int) -> float:
    """About how far AdamW can carry a coordinate: each step moves it by its learning rate or less."""
    stride = max(1, total // 10_000)
    return stride * sum(map(lr_at, range(0, total, stride)))


def make_optimizer(prompt: PromptEmbedding, args: TrainingArguments, peak: float) -> torch.optim.Optimizer:
    """Fused AdamW over the prompt alone (Trainer's `adamw_torch_fused`)."""
    betas = (args.adam_beta1, args.adam_beta2)
    return torch.optim.AdamW(
        [prompt.weight], lr=peak, betas=betas, eps=args.adam_epsilon, weight_decay=args.weight_decay, fused=True
    )


def train(
    engine: Engine,
    prompt: PromptEmbedding,
    examples: Sequence[Example],
    args: TrainingArguments,
    peak_learning_rate: float,
    callbacks: Callbacks,
    start: TrainingState | None = None,
    rows_per_step: int | None = None,
) -> None:
    """Train `prompt` in place, from the first step or from where `start` stood; then `prompt` is what it was there.
    Between steps the callbacks may want to stop; what was done is saved first. `rows_per_step` is that of one device
    where it is not given.

    Raises:
        TrainingError: a loss, gradient or prompt that is not finite (fp16 steps that the scaler skips are no fault, as
            long as its scale does not fall to nothing).
    """
    rows_per_step = rows_per_step or rows_of_a_step(args)
    total = total_steps(len(examples), args, rows_per_step)
    lr_at = learning_rates(args, peak_learning_rate, total)
    optimizer = make_optimizer(prompt, args, peak_learning_rate)
    scaler = torch.amp.GradScaler(engine.device.type, enabled=engine.compute_dtype is torch.float16)
    per_epoch = steps_per_epoch(len(examples), rows_per_step)
    start = start or TrainingState()
    taken = start.taken  # a step that the scaler skips does not move the schedule, as in Trainer
    since_log = list(start.unlogged)
    if start.step:
        optimizer.state[prompt.weight] = {name: t.to(engine.device) for name, t in start.optimizer.items()}
        scaler.load_state_dict(dict(start.scaler))
    _set_rng(start.rng, engine.device, args.seed)
    if start.step and callbacks.wants_to_stop():  # it is saved already
        return

    drawn = windows(len(examples), rows_per_step, args.seed, start.step)
    for number, rows in zip(range(start.step + 1, total + 1), drawn, strict=False):
        epoch = epochs_done(number, len(examples), args, rows_per_step)
        step, stepped = _take_step(number, epoch, rows, engine, prompt, examples, optimizer, scaler, lr_at(taken), args)
        taken += stepped
        since_log.append(step)
        callbacks.on_step(step)
        if number % args.logging_steps == 0 or number == total:
            callbacks.on_log(log_record(since_log))
            since_log = []
        evaluated = number < total and _evaluation_is_due(number, number % per_epoch == 0, args)
        worth_saving = evaluated and callbacks.on_evaluate(step)
        stop = callbacks.wants_to_stop()
        if number % args.save_steps == 0 or number == total or worth_saving or stop:
            moments, rng = optimizer.state[prompt.weight], _rng_states(engine.device)
            callbacks.on_save(step, TrainingState(number, taken, since_log, moments, scaler.state_dict(), rng))
        if stop:
            return


def _take_step(
    number: int,
    epoch: float,
    rows: Sequence[int],
    engine: Engine,
    prompt: PromptEmbedding,
    examples: Sequence[Example],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    learning_rate: float,
    args: TrainingArguments,
) -> tuple[Step, bool]:
    """Optimizer step `number` over these rows, and whether it was taken (see `optimizer_step`)."""
    began = time.perf_counter()
    window = [examples[row] for row in rows]
    optimizer.param_groups[0]["lr"] = learning_rate
    loss, grad_norm, stepped = optimizer_step(engine, prompt, window, optimizer, scaler, args.max_grad_norm)
    if stepped and not (math.isfinite(loss) and math.isfinite(grad_norm) and prompt.weight.isfinite().all()):
        raise _not_finite(number, rows, loss, grad_norm)
    if not stepped and scaler.get_scale() < LEAST_SCALE:
        raise _not_finite(number, rows, loss, grad_norm)
    tokens = sum(len(row.input_ids) for row in window)
    return Step(number, epoch, loss, grad_norm, learning_rate, tokens, time.perf_counter() - began), stepped


def optimizer_step(
    engine: Engine,
    prompt: PromptEmbedding,
    window: Sequence[Example],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    max_grad_norm: float,
) -> tuple[float, float, bool]:
    """Gradient of the window's mean loss, clipped (0: not), one step. Returns mean loss, gradient norm before clipping,
    and whether the step was taken: a scaler skips one whose fp16 gradient overflowed."""
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


def log_record(steps: Sequence[Step]) -> Metrics:
    """One line of metrics.jsonl: losses averaged over the steps since the last line, as in Trainer."""
    last = steps[-1]
    return {
        "step": last.number,
        "epoch": round(last.epoch, 4),
        "loss": _finite(sum(s.loss for s in steps) / len(steps)),
        "grad_norm": _finite(last.grad_norm),
        "learning_rate": last.learning_rate,
        "tokens_per_second": round(sum(s.tokens for s in steps) / sum(s.seconds for s in steps), 1),
    }


def _rng_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return {**states, "cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def _set_rng(states: Mapping[str, Tensor], device: torch.device, seed: int) -> None:
    """As saved; what was not saved (a new run, another kind of device) is seeded."""
    torch.manual_seed(seed)
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def _evaluation_is_due(number: int, epoch_ended: bool, args: TrainingArguments) -> bool:
    if args.eval_strategy == "steps":
        return number % (args.eval_steps or args.logging_steps) == 0
    return args.eval_strategy == "epoch" and epoch_ended


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN


def _not_finite(number: int, rows: Sequence[int], loss: float, grad_norm: float) -> TrainingError:
    some = ", ".join(map(str, rows[:NAMED])) + (" …" if len(rows) > NAMED else "")
    return TrainingError(
        f"step {number}: not finite: loss {loss}, gradient norm {grad_norm}, or the prompt after it (training rows "
        f"{some}, counted from 0 among those that have a target); lower --learning_rate"
    )
