"""Compare training speed and memory with Trainer + PEFT, all in one run: `python benchmarks/train.py`.

    python benchmarks/train.py --size mini 49m --num_virtual_tokens 1 10 50 100 200 --row_lengths 30 60 120 240 \\
        --pictures benchmarks/results
    python benchmarks/train.py --size 49m --dataset FOLDER --tokenizer FOLDER
    python benchmarks/train.py --model_name_or_path FOLDER --dataset FOLDER --contestants peft packed packed-bf16
    python benchmarks/train.py --size 1b4 --steps 1 --rounds 1 --rows_of_best 4 --no_memory

Every contestant trains the same prompt on the same frozen base with the same AdamW, with 32 rows per step:

* `peft`: Trainer on a model of get_peft_model, 4 rows × 8 micro-batches;
* `peft-best`: the same with its best settings: rows grouped by length, 32 × 1;
* `padded`, `packed`: this project's loop with its two engines; `packed-sdpa`: the packed engine with the attention
  function that it has on every device (on the CPU, this is `packed`);
* `packed-joint`: the packed engine as it runs a sharded base other than BLOOM, with the prompt in each micro-batch.

Each of these also exists with `-bf16`. All contestants have the same rows in the same windows, except `peft-best`,
which has batches that group_by_length makes of the same dataset (see `cases.Rows`). After one step each that is not
counted, they take turns for `--rounds` rounds, in reverse order in every other round. The results are medians over the
rounds:

* tokens/s: real tokens per second of the optimizer steps, without set-up; padding and virtual tokens do not count;
* ×: the ratio of two contestants in the same round;
* of the limit: the operations per second that the exact gradient needs (`measure.needed_operations`) at this speed,
  divided by the rate of a square matmul in the same dtype, measured just before and after;
* an epoch: the time of 26,858 rows (as many as Chinese Alpaca has) of this mean length;
* memory: the bytes of the base, by how much memory rises above its level in the window with the longest row, and what
  this project's engines estimate for that. On the CPU, it is measured in a separate process for each contestant.
"""

import argparse
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import torch
from arguments import ArgumentParser
from cases import NAMES, Base, Rows, from_dataset, synthetic, with_real_lengths
from contestants import ROWS_PER_STEP, SEED, Contestant, contestants, engine_of, quiet, run, steps_of
from measure import is_out_of_memory, limit_memory, machine, matmul_rate, needed_operations, peak_above, work_of
from report import Case, charts, summary, table
from torch import Tensor
from transformers import PreTrainedModel

from softprompt import mini
from softprompt.data.tokenization import Example, count_targets
from softprompt.models.loading import load_tokenizer
from softprompt.models.precision import resolve_device
from softprompt.prompt.soft_prompt import random_init


class Job(NamedTuple):
    """One case: the base, the rows, and how to train."""

    base: Base
    tokenizer: str
    P: int
    rows: Rows
    device: torch.device
    threads: int


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    limit_memory()
    device = resolve_device(args.device)
    where = machine(device)
    if where["load_average"] > 0.5:
        print(f"load average {where['load_average']:.1f}: other programs are running, and timings will suffer\n")
    chosen = [contestants(args.rows_of_best, args.tokens_per_microbatch)[name] for name in args.contestants]
    peers = [c.name for c in chosen if c.is_peer]
    names = [*args.size, *([args.model_name_or_path] if args.model_name_or_path else [])] or ["mini"]
    output = Path(args.output or f"benchmarks/results/train-{'-'.join(Path(n).name for n in names)}.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    cases: list[Case] = []
    for base in map(Base, names):
        jobs = jobs_of(args, base, device)
        for job, case in jobs:  # before this process loads a base
            in_children = device.type == "cpu" and not args.no_memory
            case["memory"] = {c.name: memory_in_child(c, job) for c in chosen} if in_children else {}
        bases = {dtype: base.load(device, dtype) for dtype in {c.weights_dtype for c in chosen}}
        for job, case in jobs:
            if device.type == "cuda" and not args.no_memory:  # measured in this process, by CUDA's allocator
                case["memory"] = {c.name: peak_of(c, bases[c.weights_dtype], job) for c in chosen}
            case["records"] = records = run_rounds(job, chosen, bases, args.rounds)
            results = summary(records, peers, case["operations_per_token"])
            case["contestants"] = {c.name: results.get(c.name, {}) for c in chosen}
            cases.append(case)
            used = {name: vars(args)[name] for name in ("rows_of_best", "tokens_per_microbatch")}
            result = {"machine": where, **used, "cases": cases}
            output.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            print(table(case, peers) + "\n", flush=True)
        del bases  # before the next one is loaded
    made = charts(cases, Path(args.pictures)) if args.pictures else []
    print("written: " + ", ".join(map(str, [output, *made])))


def parse() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    every = list(contestants())
    usual = [name for name in every if "sdpa" not in name and "joint" not in name]
    add = parser.add_argument
    add("--size", nargs="+", choices=["mini", *NAMES], default=[], help="bases; all but mini have random weights")
    add("--model_name_or_path", metavar="FOLDER", help="a real base (default: --size mini)")
    add("--num_virtual_tokens", type=int, nargs="+", default=[10])
    add("--row_lengths", type=int, nargs="+", default=[60], help="mean lengths of synthetic rows, in tokens")
    add("--real_lengths", action="store_true", help="synthetic rows with the lengths of Chinese Alpaca's instead")
    add("--dataset", help="real rows instead: what train.py's --dataset takes, or mini:TASK")
    add("--tokenizer", metavar="FOLDER", help="tokenizer of the rows (default: the base's)")
    add("--contestants", nargs="+", choices=every, default=usual, metavar="NAME", help=", ".join(every))
    add("--rows_of_best", type=int, choices=[1, 2, 4, 8, 16, 32], default=32, help="micro-batch of peft-best")
    add("--tokens_per_microbatch", type=int, metavar="N", help="of this project's engines (default: theirs)")
    add("--steps", type=int, default=3, help="optimizer steps of a round")
    add("--rounds", type=int, default=3)
    add("--device", default="cpu", help="cpu or cuda")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--no_memory", action="store_true", help="measure speed only")
    add("--output", metavar="FILE", help="JSON (default: benchmarks/results/train-SIZE.json)")
    add("--pictures", metavar="FOLDER", help="write charts of the cost over prompt and row length (needs matplotlib)")
    return parser.parse_args()


def jobs_of(args: argparse.Namespace, base: Base, device: torch.device) -> list[tuple[Job, Case]]:
    """Return a job and its description for each pool of rows and each length of the prompt."""
    work, tokenizer = work_of(base.config()), args.tokenizer or base.folder or str(mini.BASE_DIR)
    if args.dataset:
        pools = [from_dataset(args.dataset, load_tokenizer(tokenizer), work.V)]
    elif args.real_lengths:
        pools = [with_real_lengths(work.V)]
    else:
        pools = [synthetic(mean, work.V) for mean in args.row_lengths]
    made = []
    for pool in pools:
        rows = pool.choose(args.steps)
        tokens = sum(len(row.input_ids) for row in rows.plain)
        for P in args.num_virtual_tokens:
            case = {
                "base": Path(base.name).name,
                "num_virtual_tokens": P,
                "rows": pool.name,
                "mean_row_length": tokens / len(rows.plain),
                "share_of_targets": sum(map(count_targets, rows.plain)) / tokens,
                "operations_per_token": needed_operations(work, rows.plain, P, args.steps) / tokens,
                "steps": args.steps,
                "rounds": args.rounds,
            }
            made.append((Job(base, tokenizer, P, rows, device, args.threads), case))
    return made


def run_rounds(
    job: Job, chosen: list[Contestant], bases: dict[torch.dtype, PreTrainedModel], rounds: int
) -> dict[str, list[Case]]:
    """Return the records of each contestant, one per round. A contestant that runs out of memory is left out."""
    tokenizer, start = load_tokenizer(job.tokenizer), start_of(job)

    def turn(c: Contestant, rows: list[Example]) -> Case:
        before = matmul_rate(c.dtype, job.device)
        laps = run(c, bases[c.weights_dtype], tokenizer, start, rows)
        rate = (before + matmul_rate(c.dtype, job.device)) / 2
        speed = laps.tokens_per_second(c.grouped)
        print(f"{job.base.name}, P = {job.P}, {c.name}: {speed:,.0f} tokens/s", file=sys.stderr, flush=True)
        return {"tokens_per_second": speed, "matmul_rate": rate, **vars(laps)}

    def tried(c: Contestant, rows: list[Example]) -> Case | None:
        try:
            return turn(c, rows)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            print(f"{job.base.name}, P = {job.P}, {c.name}: out of memory", file=sys.stderr, flush=True)
            return None

    running = [c for c in chosen if tried(c, widest_window(c, job.rows))]
    records: dict[str, list[Case]] = {c.name: [] for c in running}
    for number in range(rounds):
        for c in running if number % 2 == 0 else reversed(running):
            if c.name in records and (record := tried(c, job.rows.grouped if c.grouped else job.rows.plain)):
                records[c.name].append(record)
            else:
                records.pop(c.name, None)
    return records


def start_of(job: Job) -> Tensor:
    """Return the initial prompt [P, H] fp32, which is the same for all contestants."""
    torch.manual_seed(SEED)
    return random_init(job.P)(torch.empty(1, job.base.config().hidden_size))


def widest_window(c: Contestant, rows: Rows) -> list[Example]:
    """Return the rows of the optimizer step that has the longest row."""
    steps = steps_of(rows.grouped if c.grouped else rows.plain, c.grouped)
    return max(steps, key=lambda step: max(len(row.input_ids) for row in step))


def memory_in_child(c: Contestant, job: Job) -> dict[str, int] | None:
    """Measure memory in a new process. Return the bytes of the base and of the peak above it; None if the contestant
    ran out of memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure_memory, c, job).result()
        except BrokenProcessPool:
            return None  # the kernel has killed the process


def measure_memory(c: Contestant, job: Job) -> dict[str, int] | None:
    torch.set_num_threads(job.threads)
    limit_memory()
    return peak_of(c, job.base.load(job.device, c.weights_dtype), job)


def peak_of(c: Contestant, base: PreTrainedModel, job: Job) -> dict[str, int] | None:
    """Bytes of the base, of the peak above it in the widest window, and of our own estimate of that."""
    tokenizer, start, rows = load_tokenizer(job.tokenizer), start_of(job), widest_window(c, job.rows)
    shortest = sorted(rows, key=lambda row: len(row.input_ids))[:1] * ROWS_PER_STEP
    try:
        run(c, base, tokenizer, start, shortest)  # warm up, so that what libraries load at first is not counted
        _, peak = peak_above(lambda: run(c, base, tokenizer, start, rows), job.device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    measured = {"base": sum(p.numel() * p.itemsize for p in base.parameters()), "peak_above": peak}
    if not c.is_peer:
        measured["estimate"] = engine_of(c, base, tokenizer, job.P).activation_bytes(job.P, rows)
    return measured


if __name__ == "__main__":
    with quiet():
        main()
