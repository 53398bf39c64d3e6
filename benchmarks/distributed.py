"""Compare several processes under torchrun with one process and with Trainer + PEFT.

    python benchmarks/distributed.py --size 49m --processes 1 2 3 --rounds 3

Every process has `--threads` threads. A step has 48 rows for any number of processes, so the run is always the same;
Trainer gets as many micro-batches of 4 rows as make 48 rows together. `packed` and `padded` are this project's engines,
`sharded` and `sharded-padded` are the same engines with --shard_base. The base has random weights. Its files are in
bf16, like most on the hub, and it is converted to fp32 when it is read: fp32 files could stay memory-mapped, and would
then not count as memory of a rank. In every round, each contestant runs with each number of processes; every other
round is in reverse order.

The results are medians over the rounds:

* tokens/s: real tokens per second of the whole run;
* efficiency: tokens/s, divided by the number of processes and by the tokens/s of one process in the same round that has
  the same engine and the whole base;
* that of products: the efficiency of square matrix products that all ranks compute at the same time, independently of
  each other, right after the run;
* bytes a step: the traffic of the loopback device per step, including that of other programs;
* reduction: the milliseconds of one reduction of the prompt's gradient, measured separately;
* MiB a rank: the peak of the anonymous resident memory of any rank since its start, sampled every 5 ms;
* loss: the mean loss of all steps; for `peft`, that of rank 0's rows only, as Trainer reports it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from arguments import ArgumentParser
from cases import SIZES, Base, synthetic
from contestants import LEARNING_RATE, SEED, StepTimer, contestants, quiet, run_trainer
from measure import matmul_rate
from stream import watched_memory, write_base
from torch import Tensor

from softprompt import mini
from softprompt.config.loader import TrainConfig, train_config
from softprompt.config.train_args import TrainingArguments
from softprompt.data.dataloader import ListLoader
from softprompt.data.sampler import windows
from softprompt.data.tokenization import Example
from softprompt.distributed.process_group import World, process_group
from softprompt.engines.base import Engine
from softprompt.engines.data_parallel import DataParallelEngine
from softprompt.engines.factory import make_engine
from softprompt.models.fsdp import shard_layers
from softprompt.models.loading import freeze, load_base, load_tokenizer, move_to_device
from softprompt.models.meta_loading import load_meta_model
from softprompt.prompt.soft_prompt import PromptEmbedding, random_init
from softprompt.training.loop import train

ROWS, ROWS_PER_MICROBATCH = 48, 4
OURS = ("packed", "padded", "sharded", "sharded-padded")
HEAD = (
    "contestant",
    "processes",
    "tokens/s",
    "efficiency",
    "that of products",
    "bytes a step",
    "reduction, ms",
    "MiB a rank",
    "loss",
)
Records = dict[tuple[str, int], list[dict[str, Any]]]


def main() -> None:
    args = parse()
    if args.rank_of:
        with process_group() as world, quiet():
            return run_rank(args, world)
    records: Records = {}
    cases = [(c, n) for n in args.processes for c in args.contestants if n > 1 or not c.startswith("sharded")]
    with tempfile.TemporaryDirectory() as folder:
        base, load = base_folder(args.size, Path(folder)), os.getloadavg()[0]
        for number in range(args.rounds):
            for name, n in cases if number % 2 == 0 else reversed(cases):
                records.setdefault((name, n), []).append(launch(args, base, name, n))
    lengths = f"rows of {args.row_lengths} tokens in the mean, {args.threads} threads a process"
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, load average {load:.1f} before")
    print(f"{args.size}, P = {args.num_virtual_tokens}, {ROWS} rows a step, {lengths}, on {args.device}")
    print(f"{args.steps} steps × {args.rounds} rounds")
    print(f"\n| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for name, n in sorted(records, key=lambda case: (args.contestants.index(case[0]), case[1])):
        print(f"| {' | '.join(table_row(records, name, n))} |")


def table_row(records: Records, name: str, n: int) -> list[str]:
    """Return the cells of one line of the table."""
    rounds, whole = records[name, n], {"sharded": "packed", "sharded-padded": "padded"}.get(name, name)
    speeds = [one["tokens_per_second"] for one in rounds]
    alone = [one["tokens_per_second"] for one in records.get((whole, 1), [])]
    shares = [speed / (n * one) for speed, one in zip(speeds, alone, strict=False)]
    wire, seconds, memory = (
        statistics.median(one[key] for one in rounds) for key in ("bytes_a_step", "reduction_seconds", "resident")
    )
    rates, products_alone = ([one["products"] for one in records.get(key, [])] for key in ((name, n), (whole, 1)))
    products = [rate / (n * one) for rate, one in zip(rates, products_alone, strict=False)]
    share, limit = (f"{statistics.median(some):.0%}" if some else "–" for some in (shares, products))
    reduction = f"{1e3 * seconds:.2f}" if seconds else "–"
    numbers = [f"{statistics.median(speeds):,.0f}", share, limit, f"{wire:,.0f}", reduction, f"{memory / 2**20:,.0f}"]
    return [name, str(n), *numbers, f"{rounds[0]['loss']:.6f}"]


def base_folder(size: str, folder: Path) -> Path:
    """Return the folder of the base: that of the mini base, or `folder`, after writing a base into it."""
    if size == "mini":
        return mini.BASE_DIR
    c = SIZES[size]
    write_base(folder, c["hidden_size"], c["n_layer"], c["n_head"], c["vocab_size"], torch.bfloat16)
    return folder


def parse() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--size", choices=["mini", *SIZES], default="49m")
    add("--processes", type=int, nargs="+", default=[1, 2, 3], help="include 1 to get the efficiency")
    add("--contestants", nargs="+", choices=[*OURS, "peft"], default=["packed", "sharded", "peft"])
    add("--num_virtual_tokens", type=int, default=10)
    add("--row_lengths", type=int, default=60, help="mean length of synthetic rows, in tokens")
    add("--steps", type=int, default=3, help="measured steps; one more step precedes them")
    add("--rounds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--device", default="cpu", help="cpu, or cuda: one GPU for each process, or one GPU that all share")
    add("--base", help=argparse.SUPPRESS)
    add("--rank_of", help=argparse.SUPPRESS)  # given to each rank: the file for its measurements
    return parser.parse_args()


def launch(args: argparse.Namespace, base: Path, name: str, n: int) -> dict[str, Any]:
    """Run one contestant in n processes, and return its measurements."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)]
        mine = [__file__, *sys.argv[1:], "--contestants", name, "--base", str(base), "--rank_of", str(found)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
        ended = subprocess.run([*torchrun, *mine], env=environment, stderr=subprocess.PIPE, text=True)
        if ended.returncode:
            raise SystemExit(f"{name}, {n} processes: {ended.stderr[-3000:]}")
        result = json.loads(found.read_text())
    print(f"{name}, {n} processes: {result['tokens_per_second']:,.0f} tokens/s", file=sys.stderr, flush=True)
    return result


def run_rank(args: argparse.Namespace, world: World) -> None:
    """Train as one rank, and combine its measurements with those of the other ranks."""
    torch.set_num_threads(args.threads)
    name, tokenizer, size = args.contestants[0], load_tokenizer(str(mini.BASE_DIR)), Base(args.size).config()
    rows = synthetic(args.row_lengths, size.vocab_size).choose(args.steps + 1, ROWS).plain
    torch.manual_seed(SEED)
    start, steps = random_init(args.num_virtual_tokens)(torch.empty(1, size.hidden_size)), args.steps + 1
    with watched_memory() as memory:
        times, loss = run(name, args, tokenizer, start, rows, steps, world)
        most = max(world.all_gather(memory()))
    products = sum(world.all_gather(matmul_rate(torch.float32, torch.device(args.device))))
    counted = list(islice(windows(len(rows), ROWS, SEED), 1, steps))
    tokens = sum(len(rows[row].input_ids) for step in counted for row in step)
    found = {
        "tokens_per_second": tokens / (times.stamps[-1] - times.stamps[1]),
        "bytes_a_step": (times.wire[-1] - times.wire[0]) / args.steps,
        "products": products,
        "reduction_seconds": reduction_seconds(start, world) if name in OURS and world.size > 1 else 0.0,
        "resident": most,
        "loss": loss,
    }
    if world.is_main:
        Path(args.rank_of).write_text(json.dumps(found))


def run(
    name: str,
    args: argparse.Namespace,
    tokenizer: Any,
    start: Tensor,
    rows: Sequence[Example],
    steps: int,
    world: World,
) -> tuple[Any, float]:
    """Train, and return the timer of the steps and the mean loss."""
    device = torch.device(args.device)
    if name == "peft":
        c, accumulation = contestants()[name], ROWS // ROWS_PER_MICROBATCH // world.size
        base = load_base(args.base, device, c.weights_dtype)
        return run_trainer(c, base, tokenizer, start, rows, steps, accumulation)
    engine, times = engine_of(name, args, tokenizer, len(start), device, world), StepTimer(device)
    settings = TrainingArguments(max_steps=steps, seed=SEED)
    prompt = PromptEmbedding(start).to(device)
    train(engine, prompt, ListLoader(rows, settings, ROWS), settings, LEARNING_RATE, times)
    return times, sum(times.losses) / steps


def engine_of(
    name: str, args: argparse.Namespace, tokenizer: Any, P: int, device: torch.device, world: World
) -> Engine:
    kind = "padded" if name.endswith("padded") else "packed"
    settings = {"engine": kind, "per_device_train_batch_size": ROWS_PER_MICROBATCH}
    config: TrainConfig = train_config(model_name_or_path=args.base, dataset="synthetic", **settings)
    if not name.startswith("sharded"):
        engine = make_engine(config, load_base(args.base, device, torch.float32), tokenizer, torch.float32, P)
        return DataParallelEngine(engine, world) if world.size > 1 else engine
    base, stored = load_meta_model(args.base, "sharded")
    base = move_to_device(freeze(base, torch.float32), device)
    shards = shard_layers(base, stored, world)
    return DataParallelEngine(make_engine(config, base, tokenizer, torch.float32, P, shards), world, shards.join)


def reduction_seconds(start: Tensor, world: World) -> float:
    """Return the median time of an all-reduce of an fp64 vector as long as the prompt's gradient, without training."""
    vector, seconds = torch.ones(start.numel(), dtype=torch.float64), []
    for _ in range(50):
        began = time.perf_counter()
        world.all_reduce(vector)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
