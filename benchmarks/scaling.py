"""Compute the tables of docs/scaling.md: the cost of a step on many devices, by the formulas of that page.

    python benchmarks/scaling.py

This command prints all tables with the page's assumptions; every assumption is a flag. `--check` applies the same
formulas to the runs of benchmarks/distributed.py, for comparison with their measurements:

    python benchmarks/scaling.py --check --reduction_ms MS --cores 2

`--dealing` measures, on this machine, the time that every rank spends in Python on assigning the rows of a step, which
the tables leave out.
"""

import argparse
import math
import os
import statistics
import timeit
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
from arguments import ArgumentParser
from cases import SIZES, TARGETS, synthetic
from contestants import SEED

from softprompt.data.sampler import windows
from softprompt.data.tokenization import Example, count_targets
from softprompt.distributed.row_assignment import assign_rows
from softprompt.engines.memory_estimate import GIB, base_bytes
from softprompt.models.bloom_weights import BloomShape
from softprompt.utils.errors import EXIT_CODES

BASES = {  # L, N, H, V
    "bloom-1b4-zh": (24, 16, 2048, 46145),
    "bloom-7b1": (30, 32, 4096, 250880),
    "bloom (176B)": (70, 112, 14336, 250880),
}
RANKS = (1, 2, 8, 16, 32, 128, 1024)
SCALARS = 1 + len(EXIT_CODES)  # numbers in a reduction in addition to the gradient: the loss and the stop requests
DRAWS = 20  # number of random windows over which the loads of the ranks are averaged
BF16 = torch.bfloat16


class Machine(NamedTuple):
    """The assumptions about a rank.

    Attributes:
        rate: Operations per second in matrix products.
        bandwidth: Bytes per second that it receives from the other ranks.
        latency: Seconds that the smallest message takes.
        disk: Bytes per second that it reads from its disk.
    """

    rate: float
    bandwidth: float
    latency: float
    disk: float


def operations(shape: BloomShape, recomputed: bool) -> float:
    """Return the operations of the matrix products for one token: the forward pass, the gradient of the input, and, if
    blocks are `recomputed` in the backward pass, the second forward pass of the blocks."""
    return (72 if recomputed else 48) * shape.L * shape.H**2 + 4 * shape.H * shape.V * TARGETS


def largest_load(lengths: Sequence[int], ranks: int) -> int:
    """Return the number of tokens of the rank that has the most, if this project assigns the rows."""
    return max(sum(lengths[row] for row in hand) for hand in assign_rows(lengths, ranks))


def mean_loads(lengths: Sequence[int], rows: int, ranks: int) -> tuple[float, float]:
    """Return the tokens of a step of `rows` rows, drawn at random from `lengths`, and the tokens of the rank that has
    the most; both are means over DRAWS draws."""
    drawn = [torch.randperm(len(lengths), generator=torch.Generator().manual_seed(n))[:rows] for n in range(DRAWS)]
    each = [[lengths[row] for row in order.tolist()] for order in drawn]
    return statistics.mean(map(sum, each)), statistics.mean(largest_load(some, ranks) for some in each)


def reduce_seconds(shape: BloomShape, P: int, ranks: int, machine: Machine) -> float:
    """Return the seconds of the all-reduce of the prompt's gradient in fp64: the latency of a tree, and the bytes of a
    ring."""
    numbers = P * shape.H + SCALARS
    sent = 2 * (ranks - 1) / ranks * 8 * numbers
    return 2 * math.ceil(math.log2(ranks)) * machine.latency + sent / machine.bandwidth


def gather_seconds(shape: BloomShape, ranks: int, machine: Machine) -> float:
    """Return the seconds in which a rank receives every block twice: for the forward and for the backward pass."""
    return 2 * (ranks - 1) / ranks * 12 * shape.L * shape.H**2 * BF16.itemsize / machine.bandwidth


def step_cost(
    shape: BloomShape, lengths: Sequence[int], rows: int, P: int, ranks: int, machine: Machine, sharded: bool
) -> tuple[float, float]:
    """Return the seconds of a step, and the efficiency: the time that one rank alone would need, divided by the total
    time of all ranks."""
    tokens, most = mean_loads(lengths, rows, ranks)
    token = operations(shape, sharded) / machine.rate
    computing = (most + P) * token
    travelling = gather_seconds(shape, ranks, machine) if sharded else 0.0
    seconds = max(computing, travelling) + reduce_seconds(shape, P, ranks, machine)
    return seconds, (tokens + P) * token / (ranks * seconds)


def sharded_bytes(shape: BloomShape, ranks: int) -> int:
    """Return the bytes of a sharded base on a rank: its slices of the blocks, two gathered blocks, and all tensors
    outside the blocks."""
    block = 12 * shape.H**2 * BF16.itemsize
    return base_bytes(shape._replace(L=0), BF16) + shape.L * block // ranks + (2 * block if ranks > 1 else 0)


def table(head: Iterable[str], lines: Iterable[Iterable[object]]) -> None:
    head = list(head)
    print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for line in lines:
        print(f"| {' | '.join(map(str, line))} |")


def shape_of(name: str) -> BloomShape:
    L, N, H, V = BASES[name]
    return BloomShape(L, N, H // N, H, V, 1e-5, False)


def print_steps(machine: Machine, lengths: Sequence[int], args: argparse.Namespace, sharded: bool) -> None:
    bases = args.sharded if sharded else args.whole
    lines = []
    for name in bases:
        for rows in args.rows:
            cells = []
            for ranks in RANKS:
                seconds, share = step_cost(shape_of(name), lengths, rows, args.P, ranks, machine, sharded)
                cells.append("–" if ranks > rows else f"{seconds:,.{0 if seconds >= 10 else 3}f} s, {share:.0%}")
            lines.append([name, rows, *cells])
    table(["base", "rows a step", *(f"{n:,} ranks" if n > 1 else "1 rank" for n in RANKS)], lines)


def print_memory(machine: Machine) -> None:
    lines = []
    for name in BASES:
        shape = shape_of(name)
        whole, stored = base_bytes(shape, BF16), BF16.itemsize * (12 * shape.L * shape.H**2 + shape.V * shape.H)
        parts = [f"{sharded_bytes(shape, n) / GIB:.1f}" for n in RANKS[1:]]
        lines.append([name, f"{whole / GIB:.1f}", f"{stored / machine.disk:.0f} s", *parts])
    table(["base", "whole, GiB", "its files read", *(f"{n:,} ranks" for n in RANKS[1:])], lines)


def print_hiding(machine: Machine, args: argparse.Namespace) -> None:
    lines = []
    for bandwidth in args.bandwidths:
        tokens = BF16.itemsize * machine.rate / (3 * bandwidth)
        lines.append([f"{bandwidth:.1e}", f"{tokens:,.0f}", f"{tokens / args.mean:,.0f}"])
    table(["bytes/s to a rank", "tokens a rank", "rows a rank"], lines)


def print_check(args: argparse.Namespace) -> None:
    """Print what the formulas give for the windows of benchmarks/distributed.py: the largest load of a rank, and the
    efficiency on `args.cores` cores with the measured time of the reduction."""
    size, steps, P = SIZES[args.size], args.steps, args.P
    rows = synthetic(60, size["vocab_size"]).choose(steps + 1, 48).plain
    drawn = [[len(rows[row].input_ids) for row in step] for step in islice(windows(len(rows), 48, SEED), 1, steps + 1)]
    alone = sum(sum(some) + P for some in drawn)
    shape = BloomShape(size["n_layer"], size["n_head"], 0, size["hidden_size"], size["vocab_size"], 1e-5, False)
    recomputing, lines = operations(shape, True) / operations(shape, False), []
    for ranks in (1, 2, 3):
        most = sum(largest_load(some, ranks) + P for some in drawn)
        slower = max(1, ranks / args.cores)
        lost = 0 if ranks == 1 else steps * args.reduction_ms / 1e3 * args.tokens_per_second  # in tokens
        share, again = alone / (ranks * (most * slower + lost)), alone / (ranks * (most * slower * recomputing + lost))
        lines.append([ranks, f"{most / (alone / ranks):.3f}", f"{share:.0%}", f"{again:.0%}" if ranks > 1 else "–"])
    table(["processes", "largest share × processes", "efficiency", "with --shard_base, before transport"], lines)


def print_dealing(lengths: Sequence[int], args: argparse.Namespace) -> None:
    """Print the time that every rank spends in Python on the rows of a step: assigning them, and counting their targets
    twice."""
    lines = []
    for rows in args.rows:
        counted, cells = [Example([0] * n, [0] * n) for n in lengths[:rows]], []
        for ranks in RANKS[1:]:
            if ranks > rows:
                cells.append("–")
                continue
            work = partial(_dealt, lengths[:rows], ranks, counted)
            cells.append(f"{1e3 * min(timeit.repeat(work, number=1, repeat=5)):.1f} ms")
        lines.append([rows, *cells])
    table(["rows a step", *(f"{n:,} ranks" for n in RANKS[1:])], lines)


def _dealt(lengths: Sequence[int], ranks: int, rows: Sequence[Example]) -> None:
    assign_rows(lengths, ranks)
    for _ in range(2):
        sum(map(count_targets, rows))


def main() -> None:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--P", type=int, default=10, help="virtual tokens")
    add("--mean", type=int, default=57, help="tokens of a row")
    add("--rows", type=int, nargs="+", default=[32, 134, 512, 8192], help="rows of a step")
    add("--rate", type=float, default=2e14, help="operations/s that a rank reaches in matrix products")
    add("--bandwidth", type=float, default=5e10, help="bytes/s to a rank from the others")
    add("--bandwidths", type=float, nargs="+", default=[3e11, 5e10, 1.25e9])
    add("--latency", type=float, default=2e-5, help="seconds of the smallest message")
    add("--disk", type=float, default=2e9, help="bytes/s from the disk")
    add("--whole", nargs="+", choices=BASES, default=["bloom-1b4-zh", "bloom-7b1"])
    add("--sharded", nargs="+", choices=BASES, default=["bloom-7b1", "bloom (176B)"])
    add("--check", action="store_true", help="instead, apply the formulas to the runs of benchmarks/distributed.py")
    add("--dealing", action="store_true", help="instead, measure the time of assigning the rows of a step")
    add("--steps", type=int, default=3, help="--check: the value of --steps of benchmarks/distributed.py")
    add("--size", choices=SIZES, default="49m", help="--check: the base")
    add("--reduction_ms", type=float, default=0.0, help="--check: the measured milliseconds of one reduction")
    add("--tokens_per_second", type=float, default=0.0, help="--check: the measured tokens/s of one process")
    add("--cores", type=int, default=os.cpu_count(), help="--check: the cores that the processes share")
    args = parser.parse_args()
    if args.check:
        return print_check(args)
    machine = Machine(args.rate, args.bandwidth, args.latency, args.disk)
    lengths = synthetic(args.mean, 1000).lengths * math.ceil(max(args.rows) / 6400)
    if args.dealing:
        return print_dealing(lengths, args)
    print("The whole base on every rank: seconds of a step, and efficiency")
    print_steps(machine, lengths, args, sharded=False)
    print("\n--shard_base: the same")
    print_steps(machine, lengths, args, sharded=True)
    print("\n--shard_base: the tokens of a rank in a step with which its compute takes as long as gathering the blocks")
    print_hiding(machine, args)
    print("\nGiB of the base in bf16 on a rank, whole and with --shard_base")
    print_memory(machine)


if __name__ == "__main__":
    main()
