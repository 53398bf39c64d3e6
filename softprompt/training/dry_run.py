"""`--dry_run`: describe a run without training: rows, steps, memory and time."""

import copy
import heapq
import time
from contextlib import closing
from itertools import islice

import torch

from softprompt.config.loader import TrainConfig
from softprompt.data.sampler import steps_per_epoch
from softprompt.distributed.process_group import World, process_group
from softprompt.engines.distillation import table_bytes
from softprompt.engines.memory_estimate import GIB, resident_bytes
from softprompt.evaluation.distillation import DistillationEvaluator
from softprompt.training.console import describe_encoder
from softprompt.training.determinism import deterministic
from softprompt.training.lr_finder import planned_steps
from softprompt.training.optimizer import make_optimizer, optimizer_bytes, optimizer_step
from softprompt.training.result import Setup
from softprompt.training.run import set_up
from softprompt.utils.progress import say

MEASURED = 3  # timed steps; an untimed one precedes them
ENOUGH = 20.0  # seconds of steps after which no other one begins; if the first one takes as long, it is the one timed
KEPT = ", except the answers with the text, which are kept for the run"


def dry_run(config: TrainConfig, world: World | None = None) -> str:
    """Load and check everything, take a few steps with a copy of the prompt, and return a description of the whole run.
    Nothing is written, except with distillation: the base's answers, which take long, are kept for the run.

    Raises:
        SoftpromptError: See `run.set_up`.
    """
    if world is None:
        with process_group() as world:
            return dry_run(config, world)
    setup = world.run_on_all(lambda: set_up(config, world))
    prompt, base, loader = setup.prompt, setup.base, setup.data.loader
    learned = sum(parameter.numel() for parameter in prompt.trained_parameters().values())
    examples, rows, n = setup.data.train.examples, loader.rows_per_step, loader.rows
    tokens = len(examples.input_ids)
    total, each = loader.total_steps, tokens / len(examples)
    in_all = round(each * _rows_in_all(total, n, rows))
    with deterministic(config.training.deterministic):
        say("measuring the speed of a few steps …")
        speed, measured = measured_speed(setup)
    held = resident_bytes(base)
    heaviest = heapq.nlargest(rows, examples, key=lambda e: len(e.input_ids))
    more = setup.engine.activation_bytes(len(prompt.weight), heaviest) + optimizer_bytes(prompt)
    encoder, predictions = describe_encoder(setup.config, prompt), _predictions_bytes(setup)
    parts = f"the base {held / GIB:.2f}, a step {more / GIB:.2f}"
    parts += f", the predictions with the text {predictions / GIB:.2f}" if predictions else ""
    lines = [
        "",
        f"Dry run: nothing is written{KEPT if setup.config.distillation.text else ''}.",
        f"rows        {_described_rows(setup, tokens)}, {each:.0f} a row",
        f"steps       {total:,} of {rows} rows, about {in_all:,} tokens in all",
        f"parameters  {learned:,} learned{f' ({encoder})' * bool(encoder)}, {base.num_parameters():,} frozen",
        f"memory      about {(held + more + predictions) / GIB:.1f} GiB: {parts}",
        f"time        about {_duration(in_all / speed)} at {speed:,.0f} tokens/s (measured over {measured} "
        f"step{'s' * (measured > 1)})" + ("; evaluation takes additional time" if setup.evaluator else ""),
    ]
    if setup.start.searches_learning_rate and (steps := planned_steps(setup)):
        lines.append(f"sweep       {steps:,} more steps before training, to find a learning rate")
    return "\n".join(lines)


def _predictions_bytes(setup: Setup) -> int:
    """Return the bytes of the predictions that a distillation holds, for training and held-out rows."""
    held_out = setup.evaluator.table if isinstance(setup.evaluator, DistillationEvaluator) else ()
    return table_bytes(setup.engine) + sum(column.nbytes for column in held_out)


def _described_rows(setup: Setup, tokens: int) -> str:
    seen = f"{len(setup.data.train.examples):,} with {tokens:,} tokens"
    if not setup.data.streamed:
        return seen
    rows = setup.data.loader.rows
    return f"{'an unknown number' if rows is None else f'{rows:,}'}, the first {seen}"


def _rows_in_all(steps: int, n: int | None, rows_per_step: int) -> int:
    """Return the number of rows in `steps` steps; the last step of each pass over `n` rows may have fewer rows. `n` is
    None if it is not known."""
    if n is None:
        return steps * rows_per_step
    passes, more = divmod(steps, steps_per_epoch(n, rows_per_step))
    return passes * n + min(more * rows_per_step, n)


def measured_speed(setup: Setup) -> tuple[float, int]:
    """Measure real tokens per second over a few optimizer steps on the first rows, with a copy of the prompt. Return it
    with the number of steps."""
    args, prompt = setup.config.training, copy.deepcopy(setup.prompt)
    optimizer = make_optimizer(prompt, args, args.learning_rate)
    scaler = torch.amp.GradScaler(setup.engine.device.type, enabled=setup.engine.compute_dtype is torch.float16)
    steps = list[tuple[float, int]]()  # seconds and tokens of each step
    with closing(setup.data.loader.windows()) as windows:
        for window in islice(windows, 1 + MEASURED):
            began = time.perf_counter()
            optimizer_step(setup.engine, prompt, window.examples, optimizer, scaler, args.max_grad_norm)  # synchronizes
            steps.append((time.perf_counter() - began, sum(len(e.input_ids) for e in window.examples)))
            if sum(seconds for seconds, _ in steps) > ENOUGH:
                break
    seconds, tokens = map(sum, zip(*(steps[1:] or steps), strict=True))
    return tokens / seconds, len(steps[1:] or steps)


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"
