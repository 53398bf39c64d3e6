"""Learning rates: the tables in docs/learning-rate.md, and a test of --find_learning_rate.

python benchmarks/learning_rates.py [--tasks sentiment] [--seeds 42 0 1]     train each initial prompt at several rates
python benchmarks/learning_rates.py --find [--tasks …] [--seeds 42]          compare the rate found with the best one
python benchmarks/learning_rates.py --model_name_or_path FOLDER --tasks FILE --max_steps 30 …      use another base

The base is `mini` by default. All other settings are the preset's defaults. --find compares the best rate of a full
sweep (the one with the lowest held-out loss, which a run cannot use) with the rate that --find_learning_rate finds on
the training rows alone, for every task, initial prompt and seed. The full sweep begins with three rates around the
default one, and is extended until the loss rises on both sides of the best rate. --json FILE stores finished runs,
and the same command continues.
"""

import contextlib
import io
import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from arguments import ArgumentParser, seed

import softprompt
from softprompt.config.loader import train_config
from softprompt.distributed.process_group import init_world
from softprompt.mini import TASKS
from softprompt.training.lr_finder import RATES as SWEPT
from softprompt.training.lr_finder import sweep_steps, with_found_rate
from softprompt.training.run import set_up
from softprompt.training.stop_signals import StopRequest

STARTS = {
    "RANDOM": {},
    "SAMPLE_VOCAB": {"prompt_tuning_init": "SAMPLE_VOCAB"},
    "TEXT": {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "下面是一段人与智能助手的对话。"},
}
RATES = (5e-5, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SHARED = ("model_name_or_path", "max_steps", "per_device_train_batch_size", "eval_rows", "max_length")
CLOSE = math.log(1.01)


class Case(NamedTuple):
    task: str
    start: str
    seed: int
    shared: tuple[tuple[str, Any], ...] = ()  # the settings that all cases share, as pairs

    @property
    def settings(self) -> dict[str, Any]:
        dataset = f"mini:{self.task}" if self.task in TASKS else self.task
        return {**STARTS[self.start], **dict(self.shared), "dataset": dataset, "seed": self.seed}

    @property
    def key(self) -> str:
        shared = (f"{name}={value}" for name, value in self.shared)
        return " ".join(map(str, (Path(self.task).name, self.start, self.seed, *shared)))


class Result(NamedTuple):
    loss: float
    exact_match: float

    def __str__(self) -> str:
        return f"{self.exact_match:.1%} | {self.loss:.4f}"


class ResultCache:
    """Runs and sweeps, each of which is done only once. `file`, if given, stores their results. A stored sweep is not
    repeated, so give a new file after a change of the sweep."""

    def __init__(self, file: Path | None):
        self.file = file
        self.done: dict[str, Any] = json.loads(file.read_text()) if file and file.exists() else {}

    def run(self, case: Case, rate: float) -> Result:
        key = f"{case.key} {rate:g}"
        if key not in self.done:
            self._keep(key, trained(case, rate))
        return Result(*self.done[key])

    def find(self, case: Case) -> dict[str, Any]:
        key = f"{case.key} found"
        if key not in self.done:
            self._keep(key, found(case))
        return self.done[key]

    def _keep(self, key: str, result: Any) -> None:
        self.done[key] = result
        if self.file:
            self.file.write_text(json.dumps(self.done, indent=0))


def main() -> None:
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("--find", action="store_true")
    parser.add_argument("--tasks", nargs="+", help=f"of {', '.join(TASKS)}, or files of rows")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--seeds", type=seed, nargs="+")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--model_name_or_path", help="the base, if not mini")
    for name in SHARED[1:]:
        parser.add_argument(f"--{name}", type=int, help="as in train.py")
    parser.add_argument("--json", type=Path, metavar="FILE", help="store finished runs here, and continue from them")
    args = parser.parse_args()
    tasks = args.tasks or (list(TASKS) if args.find else ["sentiment"])
    seeds = args.seeds or ([42] if args.find else [42, 0, 1])
    cache = ResultCache(args.json)
    shared = tuple((name, value) for name in SHARED if (value := getattr(args, name)) is not None)
    if args.find:
        find(cache, [Case(task, start, seed, shared) for task in tasks for start in args.starts for seed in seeds])
    else:
        cases = [[Case(task, start, seed, shared) for seed in seeds] for task in tasks for start in args.starts]
        sweep(cache, cases, args.rates)


def sweep(cache: ResultCache, cases: list[list[Case]], rates: Sequence[float]) -> None:
    """Print a line for each rate and list of cases: their mean."""
    print("| task | start | learning rate | exact match | held-out loss |\n|---|---|---|---|---|")
    for some in cases:
        for rate in rates:
            results = [cache.run(case, rate) for case in some]
            exact = statistics.mean(r.exact_match for r in results)
            loss = statistics.mean(r.loss for r in results)
            name = Path(some[0].task).name
            print(f"| {name} | {some[0].start} | {rate:g} | {exact:.1%} | {loss:.3f} |", flush=True)


def find(cache: ResultCache, cases: list[Case]) -> None:
    print("| task | start | seed | best rate | exact match | held-out loss | found | exact match | held-out loss |")
    print("|" + "---|" * 9)
    exact, loss, default, found_ones, share = [], [], [], [], 0.0
    for case in cases:
        swept = cache.find(case)
        full = full_sweep(cache, case, swept["default"])
        best = min(full, key=lambda rate: full[rate].loss)
        taken = cache.run(case, swept["rate"])  # a run with --find_learning_rate equals a run at the rate that it takes
        usual = cache.run(case, swept["default"])
        exact.append(full[best].exact_match - taken.exact_match)
        loss.append(math.log(taken.loss / full[best].loss))
        default.append(math.log(usual.loss / full[best].loss))
        found_ones += loss[-1:] if swept["found"] else []
        share = swept["share"]
        rate = f"{swept['rate']:.3g}" + ("" if swept["found"] else " (none found)")
        print(
            f"| {Path(case.task).name} | {case.start} | {case.seed} | {best:g} | {full[best]} | {rate} | {taken} |",
            flush=True,
        )
    found_loss, usual_loss, only = (math.expm1(statistics.mean(some or [0.0])) for some in (loss, default, found_ones))
    close, usually = (sum(one <= CLOSE for one in some) for some in (loss, default))
    print(f"\n{len(cases)} runs; the rate found, compared with the best of a full sweep, on average:")
    print(f"exact match {100 * statistics.mean(exact):.2f} points lower")
    print(f"held-out loss {found_loss:+.1%}, and {only:+.1%} where one was found (the default rate: {usual_loss:+.1%})")
    print(f"within 1 % of the best loss: {close} of {len(cases)} (the default rate: {usually})")
    print(f"none found: {len(cases) - len(found_ones)}; steps of a sweep: {share:.2f} of the run's")


def full_sweep(cache: ResultCache, case: Case, default: float) -> dict[float, Result]:
    """Return the results by rate. The sweep begins near the default rate, and ends when the best rate has a worse one
    on each side or is an end of `SWEPT`."""
    middle = min(range(len(SWEPT)), key=lambda at: abs(math.log(SWEPT[at] / default)))
    results: dict[float, Result] = {}
    low, high = middle - 1, middle + 1
    while True:
        results |= {rate: cache.run(case, rate) for rate in SWEPT[low : high + 1] if rate not in results}
        best = SWEPT.index(min(results, key=lambda rate: results[rate].loss))
        wider = max(0, min(low, best - 1)), min(len(SWEPT) - 1, max(high, best + 1))
        if wider == (low, high):
            return results
        low, high = wider


def trained(case: Case, rate: float) -> Result:
    with tempfile.TemporaryDirectory() as folder, quiet():
        metrics = softprompt.train(output_dir=str(Path(folder) / "run"), learning_rate=rate, **case.settings).metrics
    return Result(metrics["eval_loss"], metrics.get("eval_exact_match", math.nan))


def found(case: Case) -> dict[str, Any]:
    """Return the rate that a run with --find_learning_rate takes, the default rate, whether the sweep found the rate,
    and the number of the sweep's steps as a share of the run's."""
    with tempfile.TemporaryDirectory() as folder, quiet() as told, StopRequest() as request:
        config = train_config(output_dir=str(Path(folder) / "run"), find_learning_rate=True, **case.settings)
        setup = set_up(config, init_world())
        default = setup.config.training.learning_rate
        setup = with_found_rate(setup, request)
    total = setup.data.loader.total_steps
    is_found = "found none" not in told.getvalue()
    rate, share = setup.config.training.learning_rate, sweep_steps(total) / total
    return {"rate": rate, "default": default, "found": is_found, "share": share}


@contextlib.contextmanager
def quiet():
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        yield told


if __name__ == "__main__":
    main()
