"""`--dry_run`: what a run will do, before it does it."""

import copy
import time
from itertools import islice

import torch

from softprompt.batching import steps_per_epoch, windows
from softprompt.config import TrainConfig
from softprompt.determinism import deterministic
from softprompt.distributed import World, join
from softprompt.memory import GIB, held_bytes
from softprompt.prepare import Prepared, prepare
from softprompt.trainer import make_optimizer, optimizer_step

MEASURED = 3  # steps, after one that is not counted


def dry_run(config: TrainConfig, world: World | None = None) -> str:
    """Load and check everything, take a few steps with a copy of the prompt, and say what the whole run would be.
    Nothing is written.

    Raises:
        SoftpromptError: as of `prepare`.
    """
    world = world or join()
    run = world.agree(lambda: prepare(config, world))
    args, examples = config.training, run.data.examples
    rows = run.rows_per_step
    tokens = sum(len(e.input_ids) for e in examples)
    epochs, steps = divmod(run.total_steps, steps_per_epoch(len(examples), rows))
    in_all = round(tokens / len(examples) * (epochs * len(examples) + min(steps * rows, len(examples))))
    with deterministic(args.deterministic):
        speed = measured_speed(run, rows)
    base = held_bytes(run.base)
    heaviest = sorted(examples, key=lambda e: len(e.input_ids), reverse=True)[:rows]
    more = run.engine.activation_bytes(len(run.prompt.weight), heaviest)
    lines = [
        "",
        "Dry run: nothing is written.",
        f"rows        {len(examples):,} with {tokens:,} tokens, {tokens / len(examples):.0f} a row",
        f"steps       {run.total_steps:,} of {rows} rows, about {in_all:,} tokens in all",
        f"parameters  {run.prompt.weight.numel():,} learned, {sum(p.numel() for p in run.base.parameters()):,} frozen",
        f"memory      about {(base + more) / GIB:.1f} GiB: the base {base / GIB:.2f}, a step {more / GIB:.2f}",
        f"time        about {_duration(in_all / speed)} at {speed:,.0f} tokens/s (measured over {MEASURED} steps)"
        + ("; evaluation comes on top" if run.evaluator else ""),
    ]
    return "\n".join(lines)


def measured_speed(run: Prepared, rows_per_step: int) -> float:
    """Real tokens per second of a few optimizer steps on the run's first rows; the run's own prompt stays as it is."""
    args, prompt = run.config.training, copy.deepcopy(run.prompt)
    optimizer = make_optimizer(prompt, args, run.config.learning_rate)
    scaler = torch.amp.GradScaler(run.engine.device.type, enabled=run.engine.compute_dtype is torch.float16)
    began, tokens = 0.0, 0
    for step, rows in enumerate(islice(windows(len(run.data.examples), rows_per_step, args.seed), 1 + MEASURED)):
        window = [run.data.examples[row] for row in rows]
        optimizer_step(run.engine, prompt, window, optimizer, scaler, args.max_grad_norm)  # waits for its loss
        if step == 0:
            began = time.perf_counter()
        else:
            tokens += sum(len(e.input_ids) for e in window)
    return tokens / (time.perf_counter() - began)


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"
