"""Compare `--streaming` with rows that are held in memory, over a whole epoch of the same file.

    python benchmarks/large_data.py --rows 2000000

The rows are generated, with about 90 bytes each. Each contestant runs in its own process. It sets the run up as
train.py does, takes a few optimizer steps of 32 rows with the mini base, and draws the windows of a whole epoch. If it
streams, it then resumes from a position at nine tenths of the epoch, as a resumed run does. Memory is the anonymous
resident memory of the process (RssAnon), sampled every 5 ms: its value before the run, and its peak. --limit_gib sets
RLIMIT_DATA.
"""

import argparse
import contextlib
import io
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

from arguments import ArgumentParser
from stream import watched_memory

from softprompt.config.loader import train_config
from softprompt.distributed.process_group import World
from softprompt.training.dry_run import measured_speed
from softprompt.training.result import Setup
from softprompt.training.run import set_up

WORDS = "今天发现这键盘耐用那大巴质量次司机师傅真是令人惊喜电影酒店服务很好差不推荐会再来"
GIB = 2**30


def write_rows(path: Path, n: int) -> None:
    draw = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(n):
            text = "".join(draw.choices(WORDS, k=8))
            row = {"instruction": f"{number} {text}", "input": "", "output": draw.choice(("正面", "负面"))}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def measure(contestant: str, path: str, workers: int) -> None:
    """Measure one contestant, and print its line of the table."""
    settings = {"streaming": True} if contestant == "streamed" else {"preprocessing_num_workers": workers}
    with watched_memory() as memory:
        before, began = memory(), time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            run = set_up(train_config("mini", dataset=path, overwrite_cache=True, dry_run=True, **settings), World())
        speed, ready = measured_speed(run), time.perf_counter()
        rows, position, step = whole_pass(run)
        passed = time.perf_counter()
        going_on = f"{seconds_to_go_on(run, step, position):.1f}" if contestant == "streamed" else ""
        print(
            f"| {contestant} | {ready - began:.0f} | {rows / (passed - ready):,.0f} | {speed:,.0f} | {going_on} | "
            f"{before / GIB:.2f} | {memory() / GIB:.2f} |"
        )


def whole_pass(run: Setup) -> tuple[int, dict, int]:
    """Draw the windows of an epoch. Return its number of rows, and the position and the step at nine tenths of it."""
    rows, total = 0, run.data.loader.total_steps
    for number, window in enumerate(run.data.loader.windows(), start=1):
        rows += len(window.examples)
        if number == total * 9 // 10:
            position, step = dict(window.position), number
        if window.ends_epoch:
            return rows, position, step
    raise AssertionError("a loader yields windows without end")


def seconds_to_go_on(run: Setup, step: int, position: dict) -> float:
    began = time.perf_counter()
    list(islice(run.data.loader.windows(step, position), 1))
    return time.perf_counter() - began


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--contestants", nargs="+", choices=["streamed", "held"], default=["streamed", "held"])
    parser.add_argument("--limit_gib", type=float, help="RLIMIT_DATA of each contestant")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="folder for the temporary file of rows")
    parser.add_argument("--workers", type=int, default=2, help="--preprocessing_num_workers for rows held in memory")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        if args.limit_gib:
            resource.setrlimit(resource.RLIMIT_DATA, (int(args.limit_gib * GIB), resource.RLIM_INFINITY))
        return measure(args.contestants[0], args.measure, args.workers)
    with tempfile.TemporaryDirectory(dir=args.folder) as made:
        path = Path(made) / "rows.jsonl"
        write_rows(path, args.rows)
        print(f"{args.rows:,} rows, {path.stat().st_size / GIB:.2f} GiB")
        print("| rows are | s to the first step | rows/s | tokens/s | s to go on at 90 % | GiB before | GiB at most |")
        print("|---|---|---|---|---|---|---|", flush=True)
        limit = ["--limit_gib", str(args.limit_gib)] if args.limit_gib else []
        for contestant in args.contestants:
            command = [sys.executable, __file__, "--contestants", contestant, "--measure", str(path)]
            subprocess.run([*command, "--workers", str(args.workers), *limit], check=True)


if __name__ == "__main__":
    main()
