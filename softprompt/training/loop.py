"""The training loop: windows of rows through an engine, one AdamW step per window, with logging, evaluation and saving.

The loop computes what Trainer computes with the same arguments: the same order of rows, the loss normalized over the
targets of the whole optimizer step, the same schedule, clipping and AdamW.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing

import torch
from torch import Tensor

from softprompt.config.train_args import TrainingArguments
from softprompt.data.dataloader import Window, WindowLoader
from softprompt.distributed.process_group import StopSource
from softprompt.engines.base import Engine
from softprompt.prompt.soft_prompt import PromptEmbedding
from softprompt.runs.state import Metrics, Step, TrainingState
from softprompt.training.lr_schedules import learning_rates
from softprompt.training.optimizer import make_optimizer, optimizer_step, optimizer_tensors, restore_optimizer
from softprompt.utils.errors import DataError, NonFiniteError

LEAST_SCALE = 1e-4  # of a GradScaler; an overflow at a smaller scale is not caused by the scale
NAMED = 64  # the most rows of a step that an error names


class Callbacks:
    """The methods that the loop calls; by default they do nothing. The loop itself does not know reports, files or
    terminals."""

    def on_step(self, step: Step) -> None:
        """Called after each optimizer step."""

    def on_log(self, metrics: Metrics) -> None:
        """Called with a record of metrics.jsonl every `--logging_steps` and after the last step."""

    def on_evaluate(self, step: Step) -> bool:
        """Evaluate the prompt; return whether it is to be saved."""
        return False

    def on_save(self, step: Step, state: TrainingState) -> None:
        """Save the state of the loop after `step`."""

    def wants_to_stop(self) -> bool:
        """Whether to stop after this step. The loop calls this once per step, so that all ranks agree and stop after
        the same step."""
        return False


class QuietCallbacks(Callbacks):
    """Callbacks of a short training run that writes and prints nothing, such as a cell of a study or a trial of a
    learning rate. `on_every_step` is called after each step; `code` is the exit code of a request to stop, or None."""

    def __init__(self, stop: StopSource, on_every_step: Callable[[], object]):
        self.stop, self.on_every_step = stop, on_every_step
        self.code: int | None = None

    def on_step(self, step: Step) -> None:
        self.on_every_step()

    def wants_to_stop(self) -> bool:
        self.code = self.stop.exit_code
        return self.code is not None


def train(
    engine: Engine,
    prompt: PromptEmbedding,
    loader: WindowLoader,
    args: TrainingArguments,
    peak_learning_rate: float,
    callbacks: Callbacks,
    start: TrainingState | None = None,
) -> None:
    """Train `prompt` [P, H] in place, from the first step or from the state `start`. If `start` is given, `prompt` and
    its encoder must hold the values that were saved with it.

    Raises:
        NonFiniteError: The loss, the gradient or the prompt is not finite. An fp16 step that the GradScaler skips is an
            error only if the scale has become smaller than LEAST_SCALE.
        DataError: A row cannot be read; the steps before it are saved.
    """
    start = start or TrainingState()
    loop = _Loop(engine, prompt, loader, args, peak_learning_rate, callbacks, start)
    _set_rng(start.rng, engine.device, args.seed)
    # Nothing to save: `start` was read from a checkpoint.
    if loader.is_over(start.step, start.position) or (start.step and callbacks.wants_to_stop()):
        return
    with closing(loader.windows(start.step, start.position)) as windows:
        try:
            while loop.goes_on:
                loop.step(next(windows))
        except DataError:
            loop.save()
            raise


class _Loop:
    """The state that changes from step to step."""

    def __init__(
        self,
        engine: Engine,
        prompt: PromptEmbedding,
        loader: WindowLoader,
        args: TrainingArguments,
        peak: float,
        callbacks: Callbacks,
        start: TrainingState,
    ):
        self.engine, self.prompt, self.loader, self.args, self.callbacks = engine, prompt, loader, args, callbacks
        self.lr_at = learning_rates(args, peak, loader.total_steps)
        self.optimizer = make_optimizer(prompt, args, peak)
        self.scaler = torch.amp.GradScaler(engine.device.type, enabled=engine.compute_dtype is torch.float16)
        if start.step:
            restore_optimizer(self.optimizer, prompt, start.optimizer)
            if start.scaler:  # empty if the run was not in fp16 before
                self.scaler.load_state_dict(dict(start.scaler))
        self.number, self.position = start.step, start.position
        self.taken = start.taken  # skipped steps do not advance the schedule, as in Trainer
        self.since_log = list(start.unlogged)
        self.unsaved: Step | None = None  # the last step, if it is not saved yet
        self.goes_on = True

    def step(self, window: Window) -> None:
        """Take one optimizer step; then log, evaluate and save if they are due."""
        self.number, self.position = self.number + 1, window.position
        self.unsaved = step = self._take(window)
        self.since_log.append(step)
        self.callbacks.on_step(step)
        last = self.loader.is_over(self.number, self.position)
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
        """Save the state after the last step, unless it is saved already."""
        if self.unsaved:
            moments, rng = optimizer_tensors(self.optimizer, self.prompt), _rng_states(self.engine.device)
            scaler, log, encoder = self.scaler.state_dict(), self.since_log, self.prompt.encoder_state()
            state = TrainingState(self.number, self.taken, log, moments, scaler, rng, self.position, encoder)
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
            raise _not_finite(self.number, self.loader.places, window.places, loss, grad_norm)
        self.taken += stepped
        tokens = sum(len(row.input_ids) for row in window.examples)
        seconds = time.perf_counter() - began
        return Step(self.number, window.epoch, _finite(loss), _finite(grad_norm), learning_rate, tokens, seconds)


def log_record(steps: Sequence[Step]) -> Metrics:
    """Return a record of metrics.jsonl, with the loss averaged over `steps`, the steps since the last record, as in
    Trainer. Losses that are not finite are left out; the loss is None if no step has a finite one."""
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
    """Restore the saved generator states. Seed generators whose state was not saved: all of them in a new run, or the
    GPU's if the checkpoint was written on the CPU."""
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
        f"step {number}: the loss ({loss}), the gradient norm ({grad_norm}) or the prompt after the step is not finite "
        f"({named.format(some)}); lower --learning_rate"
    )
