"""The callbacks of a short training that leaves nothing on the way: a cell of a study, a rung of a sweep."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Protocol

import torch
from torch import Tensor, nn

from softprompt.config.train_args import TrainingArguments
from softprompt.data.dataloader import Window, WindowLoader
from softprompt.data.tokenization import Example, count_targets
from softprompt.distributed.process_group import StopSource
from softprompt.engines.base import Engine
from softprompt.prompt.soft_prompt import PromptEmbedding
from softprompt.runs.state import Metrics, Step, TrainingState
from softprompt.utils.errors import DataError, NonFiniteError


class QuietCallbacks:
    """`on_every_step` is called after each optimizer step. A wish to stop is read once a step, as `trainer.Callbacks`
    asks for, and kept: `code` is its exit code, None for as long as there was none."""

    def __init__(self, wish: StopSource, on_every_step: Callable[[], object]):
        self.wish, self.on_every_step = wish, on_every_step
        self.code: int | None = None

    def on_step(self, step: Step) -> None:
        self.on_every_step()

    def on_log(self, metrics: Metrics) -> None: ...

    def on_evaluate(self, step: Step) -> bool:
        return False

    def on_save(self, step: Step, state: TrainingState) -> None: ...

    def wants_to_stop(self) -> bool:
        self.code = self.wish.exit_code
        return self.code is not None


LEAST_SCALE = 1e-4  # of a GradScaler: gradients that overflow even then are no matter of scale
NAMED = 64  # rows of a step that its error names


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
    feed: WindowLoader,
    args: TrainingArguments,
    peak_learning_rate: float,
    callbacks: Callbacks,
    start: TrainingState | None = None,
) -> None:
    """Train `prompt` in place, from the first step or from where `start` stood; then `prompt` is what it was there.
    Between steps the callbacks may want to stop; what was done is saved first.

    Raises:
        NonFiniteError: a loss, gradient or prompt that is not finite (fp16 steps that the scaler skips are no fault, as
            long as its scale does not fall to nothing).
        DataError: of the feed; what was done before is saved.
    """
    start = start or TrainingState()
    loop = _Loop(engine, prompt, feed, args, peak_learning_rate, callbacks, start)
    _set_rng(start.rng, engine.device, args.seed)
    if feed.is_over(start.step, start.position) or (start.step and callbacks.wants_to_stop()):  # it is saved already
        return
    with closing(feed.windows(start.step, start.position)) as windows:
        try:
            while loop.goes_on:
                loop.step(next(windows))
        except DataError:
            loop.save()
            raise


class _Loop:
    """What goes on from step to step."""

    def __init__(
        self,
        engine: Engine,
        prompt: PromptEmbedding,
        feed: WindowLoader,
        args: TrainingArguments,
        peak: float,
        callbacks: Callbacks,
        start: TrainingState,
    ):
        self.engine, self.prompt, self.feed, self.args, self.callbacks = engine, prompt, feed, args, callbacks
        self.lr_at = learning_rates(args, peak, feed.total_steps)
        self.optimizer = make_optimizer(prompt, args, peak)
        self.scaler = torch.amp.GradScaler(engine.device.type, enabled=engine.compute_dtype is torch.float16)
        if start.step:
            self.optimizer.state[prompt.weight] = {name: t.to(engine.device) for name, t in start.optimizer.items()}
            if start.scaler:  # without one the run was not trained in fp16 before
                self.scaler.load_state_dict(dict(start.scaler))
        self.number, self.position = start.step, start.position
        self.taken = start.taken  # a step that the scaler skips does not move the schedule, as in Trainer
        self.since_log = list(start.unlogged)
        self.unsaved: Step | None = None  # the last step, where it is not saved yet
        self.goes_on = True

    def step(self, window: Window) -> None:
        """One optimizer step, and all that is due after it."""
        self.number, self.position = self.number + 1, window.position
        self.unsaved = step = self._take(window)
        self.since_log.append(step)
        self.callbacks.on_step(step)
        last = self.feed.is_over(self.number, self.position)
        if self.number % self.args.logging_steps == 0 or last:
            self.callbacks.on_log(log_record(self.since_log))
            self.since_log = []
        evaluated = not last and _evaluation_is_due(self.number, window.ends_epoch, self.args)
        worth_saving = evaluated and self.callbacks.on_evaluate(step)
        stop = self.callbacks.wants_to_stop()
        if self.number % self.args.save_steps == 0 or last or worth_saving or stop:
            self.save()
        self.goes_on = not (last or stop)

    def save(self) -> None:
        """Save the last step, unless that is done."""
        if self.unsaved:
            moments, rng = self.optimizer.state[self.prompt.weight], _rng_states(self.engine.device)
            scaler, log = self.scaler.state_dict(), self.since_log
            state = TrainingState(self.number, self.taken, log, moments, scaler, rng, self.position)
            self.callbacks.on_save(self.unsaved, state)
            self.unsaved = None

    def _take(self, window: Window) -> Step:
        began, learning_rate, scaler = time.perf_counter(), self.lr_at(self.taken), self.scaler
        self.optimizer.param_groups[0]["lr"] = learning_rate
        loss, grad_norm, stepped = optimizer_step(
            self.engine, self.prompt, window.examples, self.optimizer, scaler, self.args.max_grad_norm
        )
        finite = math.isfinite(loss) and math.isfinite(grad_norm) and bool(self.prompt.weight.isfinite().all())
        hopeless = not finite if stepped else scaler.get_scale() < LEAST_SCALE
        if hopeless:
            raise _not_finite(self.number, self.feed.places, window.places, loss, grad_norm)
        self.taken += stepped
        tokens = sum(len(row.input_ids) for row in window.examples)
        seconds = time.perf_counter() - began
        return Step(self.number, window.epoch, _finite(loss), _finite(grad_norm), learning_rate, tokens, seconds)


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
    """One line of metrics.jsonl: losses averaged over the steps since the last line, as in Trainer. A step without a
    finite loss is left out of the average; where no step has one, the loss is None."""
    last, losses = steps[-1], [step.loss for step in steps if step.loss is not None]
    return {
        "step": last.number,
        "epoch": round(last.epoch, 4),
        "loss": sum(losses) / len(losses) if losses else None,
        "grad_norm": last.grad_norm,
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


def _not_finite(number: int, named: str, places: Sequence[str], loss: float, grad_norm: float) -> NonFiniteError:
    some = ", ".join(places[:NAMED]) + (" …" if len(places) > NAMED else "")
    return NonFiniteError(
        f"step {number}: not finite: loss {loss}, gradient norm {grad_norm}, or the prompt after it "
        f"({named.format(some)}); lower --learning_rate"
    )
