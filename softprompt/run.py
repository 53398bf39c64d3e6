"""One training run: what is prepared is trained, evaluated before and after, and written."""

import sys
from contextlib import ExitStack, suppress
from dataclasses import replace
from math import isfinite
from pathlib import Path

import torch
from tqdm import tqdm

from softprompt.announce import tell_sweep
from softprompt.arguments import NEWEST
from softprompt.build import claim_output_dir
from softprompt.config import TrainConfig
from softprompt.crash import crashes_in
from softprompt.determinism import deterministic
from softprompt.distributed import Wish, World, join, launch, may_restart, restarts
from softprompt.ending import begin_report, leave_report, pushed
from softprompt.errors import ConfigError, DataError, TrainingError
from softprompt.files import write_files
from softprompt.find_rate import find_learning_rate, sweep_steps
from softprompt.prepare import Prepared, prepare
from softprompt.recorder import Recorder, Run
from softprompt.resume import newest_whole, way_on
from softprompt.stopping import StopRequest, seconds_of
from softprompt.trainer import train

LAUNCH_FILE = ".torchrun"
SAMPLED = 100  # rows among which the shortest becomes the question to try


def run_training(config: TrainConfig, world: World | None = None) -> Run:
    """Train as `config` says, telling what happens; nothing is written before everything is loaded and checked, by all
    ranks where torchrun started several.

    Raises:
        SoftpromptError: as of `prepare`, or a run that cannot go on.
    """
    if config.training.dry_run:
        raise ConfigError("dry_run=True trains nothing; from Python, print softprompt.dry_run.dry_run(config)")
    world = world or join()
    goes_on = world.gather(is_begun_here(config))[0]
    run = world.agree(lambda: prepare(restarted(config, goes_on), world))
    args = run.config.training
    with ExitStack() as stack:
        request = stack.enter_context(StopRequest(seconds_of(args.max_time) if args.max_time else None))
        claimed = world.agree(lambda: _claimed(run, stack))
        folder = Path(world.gather(str(claimed))[0])  # where none is named, each rank's clock named one
        stack.enter_context(crashes_in(folder))
        stack.enter_context(deterministic(args.deterministic))
        return _trained(replace(run, output_dir=folder), request)


def is_begun_here(config: TrainConfig) -> bool:
    """Whether an earlier start of this same torchrun made what is in the run's folder. torchrun starts again after a
    refusal, too, and then the folder is another run's."""
    with suppress(OSError):
        noted = (Path(str(config.training.output_dir)) / LAUNCH_FILE).read_text(encoding="utf-8")
        return bool(restarts()) and noted == launch()
    return False


def restarted(config: TrainConfig, goes_on: bool) -> TrainConfig:
    """The command that torchrun repeats after a rank died means: go on. Its restart count says so, not a flag.

    Raises:
        ConfigError: torchrun may restart a run whose folder has no name of its own.
    """
    args = config.training
    if args.output_dir is None and may_restart():
        raise ConfigError("torchrun --max-restarts finds a run again by its folder; name it with --output_dir")
    if not goes_on:
        return config
    if newest_whole(Path(str(args.output_dir))):
        again = replace(args, resume_from_checkpoint=NEWEST, overwrite_output_dir=False)
    else:
        again = replace(args, overwrite_output_dir=True)  # what stands there is this run's own beginning
    return replace(config, training=again)


def _claimed(run: Prepared, stack: ExitStack) -> Path:
    """The run's folder, which rank 0 makes and keeps from others."""
    if not run.world.is_main:
        return run.output_dir
    folder = stack.enter_context(claim_output_dir(run.config, run.output_dir, run.checkpoint)).folder
    if may_restart():
        write_files(folder, {LAUNCH_FILE: launch().encode()})
    return folder


def with_found_rate(run: Prepared, request: Wish) -> Prepared:
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
    tell_sweep(found, rate)
    noted = {"learning_rate": rate, "sweep": {f"{r:g}": loss for r, loss in found.losses.items() if isfinite(loss)}}
    config = replace(run.config, training=replace(args, learning_rate=rate))
    return replace(run, config=config, history=[{"step": 0, "epoch": 0.0, **noted}])


def _trained(run: Prepared, request: StopRequest) -> Run:
    with torch.no_grad():
        run.prompt.weight.copy_(run.world.from_main(run.prompt.weight))
    wish = run.world.share(request)
    if run.searches:
        run = with_found_rate(run, wish)
    recorder = Recorder(run, wish)
    recorder.tell_start()
    try:
        with recorder.progress:
            recorder.begin()
            facts = begin_report(run, recorder.arguments(), recorder.before, recorder.progress.say)
            args, peak = run.config.training, run.config.learning_rate
            train(run.engine, run.prompt, run.feed, args, peak, recorder, run.start)
            recorder.stop_if_asked()
            finished = recorder.finish(min(run.rows[:SAMPLED], key=lambda row: len(str(row))))
            if run.world.is_main:
                leave_report(run, facts, finished.before, finished.after, recorder.progress.say)
                if run.config.sharing.push_to_hub:
                    return replace(finished, not_pushed=pushed(run, recorder.progress.say))
            return finished
    except TrainingError as error:
        raise TrainingError(f"{error}; {way_on(run.output_dir)}") from None
    except DataError as error:  # of a stream
        once_mended = " --ignore_data_skip (once that is mended)"
        raise DataError(f"{error}; {way_on(run.output_dir, once_mended)}") from None
