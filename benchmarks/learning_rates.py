"""The table "learning rate" in README.md: `python benchmarks/learning_rates.py [--task sentiment] [--seeds 42 0 1]`.

Trains every kind of start at several learning rates on one task of the mini base, all else at the preset's defaults,
and prints held-out exact match and loss, means over the seeds.
"""

import argparse
import contextlib
import io
import statistics
import tempfile
from pathlib import Path
from typing import Any

import softprompt

STARTS = {
    "RANDOM": {},
    "SAMPLE_VOCAB": {"prompt_tuning_init": "SAMPLE_VOCAB"},
    "TEXT": {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "下面是一段人与智能助手的对话。"},
}
RATES = (5e-5, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="sentiment")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 0, 1])
    args = parser.parse_args()
    print("| start | learning rate | exact match | held-out loss |\n|---|---|---|---|")
    for start, settings in STARTS.items():
        for rate in RATES:
            results = [run(args.task, seed, rate, settings) for seed in args.seeds]
            exact = statistics.mean(r["eval_exact_match"] for r in results)
            loss = statistics.mean(r["eval_loss"] for r in results)
            print(f"| {start} | {rate:g} | {exact:.1%} | {loss:.3f} |", flush=True)


def run(task: str, seed: int, rate: float, settings: dict[str, Any]) -> dict[str, float]:
    settings = {**settings, "dataset": f"mini:{task}", "learning_rate": rate, "seed": seed}
    quiet = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        return softprompt.train(output_dir=str(Path(folder) / "run"), **settings).metrics


if __name__ == "__main__":
    main()
