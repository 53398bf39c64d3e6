"""`--find_learning_rate`: choose the peak learning rate by a short sweep on training rows before the run.

The prompt is trained from its initial values at each of `RATES`, for a share of the run's steps and with the run's
schedule scaled to them. The better rates are trained again, for more steps (a second rung of successive halving,
Jamieson and Talwalkar 2016, arXiv:1502.07943). Rates are compared by the mean loss over training rows that are set
aside. If the best rates of the two rungs are far apart, the sweep cannot predict the longer run, and no rate is found.
Given the same seed, the same run finds the same rate.
"""

import copy
import hashlib
import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import Subset

from softprompt.config.train_args import TrainingArguments
from softprompt.data.dataloader import ListLoader
from softprompt.data.tokenization import Example, count_targets
from softprompt.distributed.process_group import StopSource
from softprompt.engines.base import Engine
from softprompt.prompt.soft_prompt import InputEmbeddings, PromptEmbedding
from softprompt.training.loop import QuietCallbacks, train
from softprompt.training.result import Setup
from softprompt.utils.errors import NonFiniteError, Stopped
from softprompt.utils.progress import progress_bar

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # others for other default rates: see `rates_for`
RUNGS = ((1 / 20, len(RATES)), (1 / 10, 3))  # share of the run's steps, and how many rates take part
LEAST_STEPS = 10  # of each trial
SET_ASIDE, MOST_ASIDE, FEWEST_ASIDE = 1 / 4, 256, 16  # share, most and fewest training rows that are set aside
MOST_ROWS = 1 << 17  # most training rows that take part in a sweep
LEAST_GAIN = 0.01  # share of the initial loss by which a rate must lower it; else no rate is found
TIE = 0.03  # losses within this share of the lowest are a tie; the smallest rate wins, as short runs favor large ones
APART = 5  # rates whose ratio reaches this are far apart; neighbors among RATES are closer


@dataclass(frozen=True)
class Sweep:
    """The result of a sweep.

    Attributes:
        learning_rate: The rate that was found, or None.
        why: The reason if no rate was found.
        start: The loss of the initial prompt.
        losses: The loss after the last rung of each rate; inf if it is not finite.
    """

    learning_rate: float | None
    why: str
    start: float
    losses: dict[float, float]


def with_found_rate(setup: Setup, stop: StopSource) -> Setup:
    """Find the learning rate on the training rows (of a stream, on its first rows). Return the setup with that rate,
    and with a first metrics record that holds the rate and the losses of the sweep. If no rate is found, the rate is
    unchanged.

    Raises:
        Stopped: `stop` asked to stop.
    """
    start, data, examples = setup.start, setup.data, _examples(setup)
    args, total, rows_per_step = start.config.training, data.loader.total_steps, data.loader.rows_per_step
    if steps := planned_steps(setup):
        print(f"looking for a learning rate: {steps:,} steps on the training rows …")
    config, word_rms = start.config, InputEmbeddings(setup.base).rms()
    rates = rates_for(replace(config, training=replace(args, learning_rate=None)).learning_rate(word_rms))
    with progress_bar(steps, "looking for a learning rate", "step") as bar:
        found = find_learning_rate(
            *(setup.engine, setup.prompt, examples, args, total, rows_per_step, stop, bar.update), rates=rates
        )
    rate = found.learning_rate or args.learning_rate
    print_sweep(found, rate)
    losses = {f"{r:g}": loss for r, loss in found.losses.items() if math.isfinite(loss)}
    record = {"step": 0, "epoch": 0.0, "learning_rate": rate, "sweep": losses}
    config = replace(config, training=replace(args, learning_rate=rate))
    return setup._replace(start=replace(start, config=config, history=[record]))


def planned_steps(setup: Setup) -> int:
    """Return the number of optimizer steps of the sweep before a run; 0 if it has too few rows for one."""
    enough = int(len(_examples(setup)) * SET_ASIDE) >= FEWEST_ASIDE
    return sweep_steps(setup.data.loader.total_steps) if enough else 0


def _examples(setup: Setup) -> Sequence[Example]:
    loader = setup.data.loader
    return loader.examples if isinstance(loader, ListLoader) else setup.data.train.examples


def rates_for(default: float | None) -> tuple[float, ...]:
    """Return RATES, scaled by the power of ten nearest to 1 for which the default rate is at least the second of them
    and below the last. The default is that of RANDOM, or in proportion to the base's word embeddings."""
    scale = 1.0
    while default and default < 0.99 * RATES[1] * scale:  # as 3e-3 * 0.1 is above 3e-4
        scale /= 10
    while default and math.isfinite(default) and default > 0.99 * RATES[-1] * scale:
        scale *= 10
    return tuple(float(f"{rate * scale:.6g}") for rate in RATES)


def print_sweep(found: Sweep, rate: float) -> None:
    """Print what the sweep found, and the learning rate that the run takes."""
    if found.losses:
        told = ", ".join(f"{r:g}: {loss:.4f}" for r, loss in sorted(found.losses.items()))
        print(f"loss on rows set aside: {found.start:.4f} before training; by learning rate {told}")
    if found.learning_rate is None:
        print(f"warning: --find_learning_rate found none: {found.why}; learning rate {rate:g} is taken")
    else:
        print(f"learning rate {rate:g} is taken")


def sweep_steps(total: int) -> int:
    """Return the number of optimizer steps of the sweep before a run of `total` steps."""
    return sum(most * _steps(total, share) for share, most in RUNGS)


def find_learning_rate(
    engine: Engine,
    start: PromptEmbedding,
    examples: Sequence[Example],
    args: TrainingArguments,
    total: int,
    rows_per_step: int,
    request: StopSource,
    on_step: Callable[[], object] = lambda: None,
    rates: Sequence[float] = RATES,
    tie: float = TIE,
) -> Sweep:
    """Run the sweep.

    Args:
        start: The prompt with its initial values, on the engine's device; it is not changed.
        total: Number of steps of the run that follows.
        on_step: Called after every step of the sweep.
        rates, tie: See `successive_halving`.

    Raises:
        Stopped: `request` asked to stop.
        TrainingError: An error that would end the run at any rate, such as a lack of memory or a lost rank.
    """
    held, rest = set_aside(examples, args.seed)
    if len(held) < FEWEST_ASIDE:
        why = f"{len(examples):,} rows are too few to set some aside for comparing the rates"
        return Sweep(None, why, math.nan, {})

    trials = _Trials(engine, start, held, rest, args, total, rows_per_step, request, on_step)
    return successive_halving(trials.loss_of(start.weight.detach()), trials.loss_after, total, rates, tie)


@dataclass(frozen=True)
class _Trials:
    """Short training runs from the same initial prompt, compared by their mean loss over `held`. The arguments are
    those of `find_learning_rate`; `rest` are the rows that are trained on."""

    engine: Engine
    start: PromptEmbedding
    held: Sequence[Example]
    rest: Sequence[Example]
    args: TrainingArguments
    total: int
    rows_per_step: int
    stop: StopSource
    on_step: Callable[[], object]

    def loss_of(self, prompt: Tensor) -> float:
        loss, targets = self.engine.evaluate(prompt, self.held)
        return loss.item() / targets

    def loss_after(self, rate: float, steps: int) -> float:
        """Train at a rate for a number of steps, and return the loss; inf if it is not finite."""
        prompt, watch = copy.deepcopy(self.start), QuietCallbacks(self.stop, self.on_step)
        short = short_schedule(self.args, steps, self.total)
        try:
            train(self.engine, prompt, ListLoader(self.rest, short, self.rows_per_step), short, rate, watch)
        except NonFiniteError:
            return math.inf
        if watch.code is not None:
            raise Stopped(
                "stopped while looking for a learning rate; the same command starts from the beginning", watch.code
            )
        loss = self.loss_of(prompt.weight.detach())
        return loss if math.isfinite(loss) else math.inf


def successive_halving(
    start: float,
    loss_after: Callable[[float, int], float],
    total: int,
    rates: Sequence[float] = RATES,
    tie: float = TIE,
) -> Sweep:
    """Choose among `rates`.

    Args:
        start: Loss of the initial prompt.
        loss_after: Trains the initial prompt at a rate for a number of steps, and returns its loss.
        total: Number of steps of the run that follows.
        tie: See TIE.
    """
    losses: dict[float, float] = {}
    left = list(rates)
    for share, most in RUNGS:
        left = sorted(left, key=lambda rate: losses.get(rate, 0.0))[:most]  # the best of the rung before comes first
        losses |= {rate: loss_after(rate, _steps(total, share)) for rate in left}
    lowest = min(losses[rate] for rate in left)
    if not lowest < start * (1 - LEAST_GAIN):
        return Sweep(None, "no rate lowered the loss within the sweep", start, losses)
    close = [rate for rate in left if losses[rate] <= lowest * (1 + tie)]
    found, before = min(close), left[0]
    if before not in close and not 1 / APART < found / before < APART:
        why = f"its trials contradict each other: {before:g} was best in the shorter ones, {found:g} in the longer"
        return Sweep(None, why, start, losses)
    return Sweep(found, "", start, losses)


def set_aside(examples: Sequence[Example], seed: int) -> tuple[list[Example], Sequence[Example]]:
    """Split the examples into those on which the rates are compared, drawn with the seed, and the rest, on which the
    prompt is trained. Examples with the same question, such as the answers of a distillation, stay together where
    that leaves enough to set aside. Of very many examples, a sample is taken."""
    aside = min(MOST_ASIDE, int(len(examples) * SET_ASIDE))
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))[:MOST_ROWS].tolist()
    together: dict[bytes, list[int]] = {}
    for number in order:
        together.setdefault(_question_of(examples[number]), []).append(number)
    held: list[int] = []
    for numbers in together.values():
        if len(held) + len(numbers) <= aside:
            held += numbers
    if len(held) < min(aside, FEWEST_ASIDE):
        held = order[:aside]
    chosen = set(held)
    return [examples[i] for i in held], Subset(examples, [i for i in order if i not in chosen])


def _question_of(example: Example) -> bytes:
    """Return a hash of the token ids before the targets at the row's end."""
    ids = example.input_ids[: len(example.input_ids) - count_targets(example)]
    return hashlib.blake2b(array("q", ids).tobytes(), digest_size=16).digest()


def short_schedule(args: TrainingArguments, steps: int, total: int) -> TrainingArguments:
    """Return the settings of a run of `steps` steps with the schedule of a run of `total` steps: a warm-up that is
    given as a number of steps is scaled."""
    warmup = args.warmup_steps if args.warmup_steps < 1 else min(0.99, args.warmup_steps / total)
    return replace(args, max_steps=steps, warmup_steps=warmup)


def _steps(total: int, share: float) -> int:
    return min(total, max(LEAST_STEPS, math.ceil(total * share)))
