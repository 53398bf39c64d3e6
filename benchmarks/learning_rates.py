"""Learning rates on the mini base: the table "learning rate" in README.md, and what --find_learning_rate makes of them.

python benchmarks/learning_rates.py [--tasks sentiment] [--seeds 42 0 1]     every start at several rates
python benchmarks/learning_rates.py --find [--tasks …] [--seeds 42]          beside the rate that a sweep finds

All else is at the preset's defaults. --find sets the best of a full sweep (the rate with the lowest held-out loss,
which no run may look at) beside the rate found on the training rows alone, for every task, start and seed.
"""

import argparse
import contextlib
import io
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import softprompt
from softprompt.arguments import DEFAULT_LEARNING_RATES
from softprompt.find_rate import RATES as SWEPT
from softprompt.mini import TASKS

STARTS = {
    "RANDOM": {},
    "SAMPLE_VOCAB": {"prompt_tuning_init": "SAMPLE_VOCAB"},
    "TEXT": {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "下面是一段人与智能助手的对话。"},
}
RATES = (5e-5, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--find", action="store_true")
    parser.add_argument("--tasks", nargs="+", choices=TASKS)
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--seeds", type=int, nargs="+")
    args = parser.parse_args()
    if args.find:
        find(args.tasks or list(TASKS), args.starts, args.seeds or [42])
    else:
        sweep(args.tasks or ["sentiment"], args.starts, args.seeds or [42, 0, 1])


def sweep(tasks: list[str], starts: list[str], seeds: list[int]) -> None:
    print("| task | start | learning rate | exact match | held-out loss |\n|---|---|---|---|---|")
    for task in tasks:
        for start in starts:
            for rate in RATES:
                results = [run(task, seed, start, learning_rate=rate) for seed in seeds]
                exact = statistics.mean(r["eval_exact_match"] for r in results)
                loss = statistics.mean(r["eval_loss"] for r in results)
                print(f"| {task} | {start} | {rate:g} | {exact:.1%} | {loss:.3f} |", flush=True)


def find(tasks: list[str], starts: list[str], seeds: list[int]) -> None:
    print("| task | start | seed | best rate | exact match | held-out loss | found | exact match | held-out loss |")
    print("|" + "---|" * 9)
    exact, loss, default = [], [], []
    for task in tasks:
        for start in starts:
            for seed in seeds:
                full = {rate: run(task, seed, start, learning_rate=rate) for rate in SWEPT}
                best = min(full, key=lambda rate: full[rate]["eval_loss"])
                found = run(task, seed, start, find_learning_rate=True)
                usual = full[DEFAULT_LEARNING_RATES[start]]
                exact.append(full[best]["eval_exact_match"] - found["eval_exact_match"])
                loss.append(math.log(found["eval_loss"] / full[best]["eval_loss"]))
                default.append(math.log(usual["eval_loss"] / full[best]["eval_loss"]))
                shown = [f"{r['eval_exact_match']:.1%} | {r['eval_loss']:.4f}" for r in (full[best], found)]
                print(
                    f"| {task} | {start} | {seed} | {best:g} | {shown[0]} | {found['rate']:g} | {shown[1]} |",
                    flush=True,
                )
    print(f"\n{len(exact)} runs; the rate found, beside the best of a full sweep, on average:")
    print(f"exact match {100 * statistics.mean(exact):.2f} points lower")
    found_loss, usual_loss = (math.expm1(statistics.mean(some)) for some in (loss, default))
    print(f"held-out loss {found_loss:+.1%} (the default rate: {usual_loss:+.1%})")


def run(task: str, seed: int, start: str, **settings: Any) -> dict[str, float]:
    settings = {**STARTS[start], **settings, "dataset": f"mini:{task}", "seed": seed}
    quiet = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        ended = softprompt.train(output_dir=str(Path(folder) / "run"), **settings)
        return {**ended.metrics, "rate": ended.config.learning_rate}


if __name__ == "__main__":
    main()
