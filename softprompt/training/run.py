"""One training run: what is prepared is trained, evaluated before and after, and written."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from softprompt.config.loader import TrainConfig
from softprompt.config.value_parsers import parse_duration
from softprompt.distributed.process_group import StopSource, World, process_group
from softprompt.prompt.initial import goes_on_in
from softprompt.runs.crash_report import crashes_in
from softprompt.runs.output_dir import claim_output_dir
from softprompt.runs.train_state import way_on
from softprompt.training.auto_resume import has_saved, resume_settings
from softprompt.training.callbacks import Run, RunCallbacks, clear_output_dir
from softprompt.training.console import print_sweep
from softprompt.training.determinism import deterministic
from softprompt.training.loop import train
from softprompt.training.lr_finder import find_learning_rate, sweep_steps
from softprompt.training.setup import Prepared, prepare
from softprompt.training.stop_signals import StopRequest
from softprompt.utils.errors import ConfigError, DataError, OutputError, TrainingError
from softprompt.utils.torchrun_env import launched, start

PLACES = {
    *("model_name_or_path", "device", "offload_folder", "dataset", "eval_dataset", "init_adapter", "output_dir"),
    *("resume_from_checkpoint", "overwrite_output_dir", "overwrite_cache"),
}


class Observer(Protocol):
    """What a run calls on rank 0, for what training does not know about: the report and the upload."""

    def check(self, config: TrainConfig, output_dir: Path) -> None:
        """Raise SoftpromptError for what would fail after training. Called before any row is read."""
        ...

    def begin(self, run: Prepared, callbacks: RunCallbacks) -> None:
        """The base has been evaluated, and training is about to start."""
        ...

    def end(self, run: Prepared, callbacks: RunCallbacks, finished: Run) -> Run:
        """The run is whole and written. Return it, with what is to be added."""
        ...


def run_training(config: TrainConfig, world: World | None = None, observer: Observer | None = None) -> Run:
    """Train as `config` says, telling what happens; nothing is written before everything is loaded and checked, by all
    ranks where torchrun started several.

    Raises:
        SoftpromptError: as of `prepare`, or a run that cannot go on.
    """
    if config.training.dry_run:
        raise ConfigError("dry_run=True trains nothing; from Python, print softprompt.training.dry_run.dry_run(config)")
    if world is None:
        with process_group() as world:
            return run_training(config, world, observer)
    starts = world.gather(start()) if launched() else []
    goes_on = world.gather(has_saved(config, starts))[0]
    run = world.agree(lambda: prepare(resume_settings(config, goes_on), world, observer.check if observer else None))
    world.agree(lambda: _refuse_unlike(world.gather(_known_by(run))))
    args = run.config.training
    with ExitStack() as stack:
        request = stack.enter_context(StopRequest(parse_duration(args.max_time) if args.max_time else None))
        claimed = world.agree(lambda: _claimed(run, stack))
        folder = Path(world.gather(str(claimed))[0])  # where none is named, each rank's clock named one
        stack.enter_context(crashes_in(folder))
        stack.enter_context(deterministic(args.deterministic))
        return _trained(replace(run, output_dir=folder, starts=starts), request, observer)


def _known_by(run: Prepared) -> dict[str, Any]:
    """In what no two ranks may differ: all but where things are, which each node may have elsewhere."""
    flags = {f"--{name}": value for name, value in run.config.as_dict().items() if name not in PLACES}
    begun = {"step to go on after": run.start.step, "number of steps": run.feed.total_steps}
    return {**begun, "number of rows in a step": run.feed.rows_per_step, **flags, **run.fingerprints}


def _refuse_unlike(ranks: Sequence[Mapping[str, Any]]) -> None:
    """Raises ConfigError where a rank has begun with something else than rank 0: nodes may have disks of their own."""
    for rank, known in enumerate(ranks):
        if unlike := [what for what in known if known[what] != ranks[0].get(what)]:
            raise ConfigError(
                f"rank {rank} has another {' and another '.join(unlike)} than rank 0; give all nodes the same command, "
                "and folders that all of them see, or equal copies"
            )


def _claimed(run: Prepared, stack: ExitStack) -> Path:
    """The run's folder, which rank 0 makes, keeps from others, and clears of what is to be overwritten."""
    if not run.world.is_main:
        return run.output_dir
    folder = stack.enter_context(claim_output_dir(run.config, run.output_dir, run.checkpoint)).folder
    try:
        clear_output_dir(folder, goes_on_in(folder, run.checkpoint))
    except OSError as error:
        raise OutputError(
            f"--output_dir {folder}: cannot be written to ({error.strerror}); name another folder"
        ) from None
    return folder


def with_found_rate(run: Prepared, request: StopSource) -> Prepared:
    """The same run at the learning rate that a sweep finds (of a stream, on its first rows), told and noted as the
    first line of its metrics; at its own where none is found."""
    args, total = run.config.training, run.feed.total_steps
    steps = sweep_steps(total)
    print(f"looking for a learning rate: {steps:,} steps on the training rows …")
    with tqdm(total=steps, unit="step", desc="looking", disable=not (run.world.is_main and sys.stderr.isatty())) as bar:
        values, examples = run.prompt.weight.detach(), run.data.examples
        found = find_learning_rate(
            run.engine, values, examples, args, total, run.feed.rows_per_step, request, bar.update
        )
    rate = found.learning_rate or run.config.learning_rate
    print_sweep(found, rate)
    noted = {"learning_rate": rate, "sweep": {f"{r:g}": loss for r, loss in found.losses.items() if isfinite(loss)}}
    config = replace(run.config, training=replace(args, learning_rate=rate))
    return replace(run, config=config, history=[{"step": 0, "epoch": 0.0, **noted}])


def _trained(run: Prepared, request: StopRequest, observer: Observer | None) -> Run:
    with torch.no_grad():
        run.prompt.weight.copy_(run.world.from_main(run.prompt.weight))
    wish = run.world.share(request)
    if run.searches:
        run = with_found_rate(run, wish)
    recorder = RunCallbacks(run, wish)
    recorder.tell_start()
    try:
        with recorder.progress:
            recorder.begin()
            if observer and run.world.is_main:
                observer.begin(run, recorder)
            args, peak = run.config.training, run.config.learning_rate
            train(run.engine, run.prompt, run.feed, args, peak, recorder, run.start)
            recorder.stop_if_asked()
            finished = recorder.finish()
            return observer.end(run, recorder, finished) if observer and run.world.is_main else finished
    except TrainingError as error:
        raise TrainingError(f"{error}; {way_on(run.output_dir)}") from None
    except DataError as error:  # of a stream
        raise DataError(f"{error}; once that is mended, {way_on(run.output_dir, ' --ignore_data_skip')}") from None
