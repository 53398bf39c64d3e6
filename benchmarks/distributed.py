"""Several processes under torchrun beside one, and beside Trainer + PEFT: `python benchmarks/distributed.py`.

    python benchmarks/distributed.py --size 49m --processes 1 2 3 --rounds 3

Every process has `--threads` threads. A step has 48 rows whatever the number of processes, so the run is the same run;
Trainer gets micro-batches of 4 rows, as many as make 48 together. In every round each side runs with each number of
processes, every other round backwards. Figures are medians: real tokens a second of the whole run; efficiency, that
over as many times a single process's in the same round; bytes that went over the loopback device in the last step,
other programs' included; milliseconds of one reduction of the prompt's gradient by itself; the largest resident memory
of a rank.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from cases import SIZES, Base, synthetic
from contestants import LEARNING_RATE, SEED, Contestant, Ours, contestants, engine_of, quiet, run_trainer
from measure import resident
from torch import Tensor

from softprompt import mini
from softprompt.batching import windows
from softprompt.config import TrainingArguments
from softprompt.data import Example
from softprompt.distributed import World, joined
from softprompt.feed import Listed
from softprompt.model import load_tokenizer
from softprompt.prompt import PromptEmbedding, random_init
from softprompt.shared import SharedEngine
from softprompt.trainer import train

ROWS, ROWS_PER_MICROBATCH = 48, 4
HEAD = ("contestant", "processes", "tokens/s", "efficiency", "bytes a step", "reduction, ms", "MiB a rank", "loss")


def main() -> None:
    args = parse()
    if args.rank_of:
        with joined() as world, quiet():
            return work(args, world)
    records: dict[tuple[str, int], list[dict[str, Any]]] = {}
    cases = [(name, n) for n in args.processes for name in args.contestants]
    for number in range(args.rounds):
        for name, n in cases if number % 2 == 0 else reversed(cases):
            records.setdefault((name, n), []).append(launched(args, name, n))
    print(
        f"{args.size}, P = {args.num_virtual_tokens}, {ROWS} rows a step, {args.steps} steps × {args.rounds} rounds, "
    )
    print(f"\n| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for (name, n), rounds in records.items():
        alone = [one["tokens_per_second"] for one in records[name, args.processes[0]]]
        speeds = [one["tokens_per_second"] for one in rounds]
        share = statistics.median(s / (n / args.processes[0] * a) for s, a in zip(speeds, alone, strict=True))
        bytes_a_step, seconds, memory = (
            statistics.median(one[key] for one in rounds) for key in ("bytes_a_step", "reduction_seconds", "resident")
        )
        cells = [name, n, f"{statistics.median(speeds):,.0f}", f"{share:.0%}", f"{bytes_a_step:,.0f}"]
        cells += [f"{1e3 * seconds:.2f}" if seconds else "–", f"{memory / 2**20:,.0f}", f"{rounds[0]['loss']:.6f}"]
        print(f"| {' | '.join(map(str, cells))} |")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", choices=["mini", *SIZES], default="49m")
    add("--processes", type=int, nargs="+", default=[1, 2, 3], help="efficiency is against the first")
    add("--contestants", nargs="+", choices=["packed", "padded", "peft"], default=["packed", "peft"])
    add("--num_virtual_tokens", type=int, default=10)
    add("--row_lengths", type=int, default=60, help="mean length of synthetic rows, in tokens")
    add("--steps", type=int, default=3, help="steps that count, after one that does not")
    add("--rounds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--rank_of", help=argparse.SUPPRESS)  # this process is a rank; the file for what it measures
    return parser.parse_args()


def launched(args: argparse.Namespace, name: str, n: int) -> dict[str, Any]:
    """One run of one contestant in n processes."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)]
        mine = [__file__, *sys.argv[1:], "--contestants", name, "--rank_of", str(found)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
        subprocess.run([*torchrun, *mine], env=environment, check=True, stderr=subprocess.DEVNULL)
        result = json.loads(found.read_text())
    print(f"{name}, {n} processes: {result['tokens_per_second']:,.0f} tokens/s", file=sys.stderr, flush=True)
    return result


def work(args: argparse.Namespace, world: World) -> None:
    """What a rank does: the run, and its measures together with the other ranks'."""
    torch.set_num_threads(args.threads)
    c, base, device = contestants()[args.contestants[0]], Base(args.size), torch.device("cpu")
    model, tokenizer = base.load(device, c.weights_dtype), load_tokenizer(str(mini.BASE_DIR))
    rows = synthetic(args.row_lengths, base.config().vocab_size).choose(args.steps + 1, ROWS).plain
    torch.manual_seed(SEED)
    start = random_init(args.num_virtual_tokens)(torch.empty(1, base.config().hidden_size))
    if c.is_peer:
        accumulation = ROWS // ROWS_PER_MICROBATCH // world.size
        times, loss = run_trainer(c, model, tokenizer, start, rows, args.steps + 1, accumulation)
    else:
        times, loss = run_ours(c, model, tokenizer, start, rows, args.steps + 1, world)
    counted = list(islice(windows(len(rows), ROWS, SEED), 1, args.steps + 1))
    tokens = sum(len(rows[row].input_ids) for step in counted for row in step)
    memory = max(world.gather(resident("VmHWM")))
    found = {
        "tokens_per_second": tokens / (times.stamps[-1] - times.stamps[1]),
        "bytes_a_step": times.wire[-1] - times.wire[-2],
        "reduction_seconds": 0.0 if c.is_peer or world.size == 1 else reduction_seconds(start, world),
        "resident": memory,
        "loss": loss,
    }
    if world.is_main:
        Path(args.rank_of).write_text(json.dumps(found))


def run_ours(
    c: Contestant, model: Any, tokenizer: Any, start: Tensor, rows: list[Example], steps: int, world: World
) -> tuple[Ours, float]:
    engine = engine_of(c, model, tokenizer, len(start))
    shared = SharedEngine(engine, world) if world.size > 1 else engine
    settings = TrainingArguments(max_steps=steps, seed=SEED)
    times = Ours(engine.device)
    train(shared, PromptEmbedding(start), Listed(rows, settings, ROWS), settings, LEARNING_RATE, times)
    return times, sum(times.losses) / steps


def reduction_seconds(start: Tensor, world: World) -> float:
    """Of adding up a vector as long as the prompt's gradient in fp64, by itself; the median of several."""
    vector, seconds = torch.ones(start.numel(), dtype=torch.float64), []
    for _ in range(50):
        began = time.perf_counter()
        world.add_up(vector)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
