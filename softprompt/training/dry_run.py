"""`--dry_run`: what a run will do, before it does it."""

import copy
import time
from contextlib import closing
from itertools import islice

import torch

from softprompt.config.loader import TrainConfig
from softprompt.data.sampler import steps_per_epoch
from softprompt.distributed.process_group import World, process_group
from softprompt.engines.memory_estimate import GIB, resident_bytes
from softprompt.training.determinism import deterministic
from softprompt.training.loop import make_optimizer, optimizer_step
from softprompt.training.lr_finder import sweep_steps
from softprompt.training.setup import Prepared, prepare

MEASURED = 3  # steps, after one that is not counted


def dry_run(config: TrainConfig, world: World | None = None) -> str:
    """Load and check everything, take a few steps with a copy of the prompt, and say what the whole run would be.
    Nothing is written.

    Raises:
        SoftpromptError: as of `prepare`.
    """
    if world is None:
        with process_group() as world:
            return dry_run(config, world)
    run = world.agree(lambda: prepare(config, world))
    feed, examples = run.feed, run.data.examples
    rows, n = feed.rows_per_step, feed.rows
    tokens = sum(len(e.input_ids) for e in examples)
    total, each = feed.total_steps, tokens / len(examples)
    in_all = round(each * _rows_in_all(total, n, rows))
    with deterministic(config.training.deterministic):
        speed = measured_speed(run)
    base = resident_bytes(run.base)
    heaviest = sorted(examples, key=lambda e: len(e.input_ids), reverse=True)[:rows]
    more = run.engine.activation_bytes(len(run.prompt.weight), heaviest)
    lines = [
        "",
        "Dry run: nothing is written.",
        f"rows        {_told_rows(run, tokens)}, {each:.0f} a row",
        f"steps       {total:,} of {rows} rows, about {in_all:,} tokens in all",
        f"parameters  {run.prompt.weight.numel():,} learned, {sum(p.numel() for p in run.base.parameters()):,} frozen",
        f"memory      about {(base + more) / GIB:.1f} GiB: the base {base / GIB:.2f}, a step {more / GIB:.2f}",
        f"time        about {_duration(in_all / speed)} at {speed:,.0f} tokens/s (measured over {MEASURED} steps)"
        + ("; evaluation comes on top" if run.evaluator else ""),
    ]
    if run.searches:
        lines.append(f"sweep       {sweep_steps(total):,} steps before it, to find a learning rate")
    return "\n".join(lines)


def _told_rows(run: Prepared, tokens: int) -> str:
    seen = f"{len(run.data.examples):,} with {tokens:,} tokens"
    if not run.config.data.streaming:
        return seen
    return f"{'an unknown number' if run.feed.rows is None else f'{run.feed.rows:,}'}, the first {seen}"


def _rows_in_all(steps: int, n: int | None, rows_per_step: int) -> int:
    """Rows of so many steps, where every pass over `n` rows ends with a short one."""
    if n is None:
        return steps * rows_per_step
    passes, more = divmod(steps, steps_per_epoch(n, rows_per_step))
    return passes * n + min(more * rows_per_step, n)


def measured_speed(run: Prepared) -> float:
    """Real tokens per second of a few optimizer steps on the run's first rows; the run's own prompt stays as it is."""
    args, prompt = run.config.training, copy.deepcopy(run.prompt)
    optimizer = make_optimizer(prompt, args, run.config.learning_rate)
    scaler = torch.amp.GradScaler(run.engine.device.type, enabled=run.engine.compute_dtype is torch.float16)
    began, tokens = 0.0, 0
    with closing(run.feed.windows()) as windows:
        for step, window in enumerate(islice(windows, 1 + MEASURED)):
            optimizer_step(run.engine, prompt, window.examples, optimizer, scaler, args.max_grad_norm)  # waits for it
            if step == 0:
                began = time.perf_counter()
            else:
                tokens += sum(len(e.input_ids) for e in window.examples)
    return tokens / (time.perf_counter() - began)


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"
