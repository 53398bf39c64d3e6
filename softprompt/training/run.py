"""A training run, from settings to a saved prompt."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch

from softprompt.config.loader import TrainConfig
from softprompt.distributed.process_group import World, process_group
from softprompt.engines.microbatch_engine import MicrobatchEngine
from softprompt.engines.padded import PromptTunedModel
from softprompt.models.capabilities import why_not_generate
from softprompt.runs.crash_report import crashes_in
from softprompt.runs.output_dir import claim_output_dir, continues_in
from softprompt.runs.run_files import remove_run, tidy
from softprompt.runs.train_state import way_on
from softprompt.training.auto_resume import has_saved, with_auto_resume
from softprompt.training.callbacks import RunCallbacks
from softprompt.training.console import print_model, print_steps
from softprompt.training.determinism import deterministic
from softprompt.training.distillation import distilled
from softprompt.training.engine_setup import held_out_classifier, make_engines, make_evaluator
from softprompt.training.load_run import load_run, time_limit
from softprompt.training.loop import train
from softprompt.training.lr_finder import with_found_rate
from softprompt.training.result import Run, RunAnswers, Setup
from softprompt.training.stop_signals import StopRequest
from softprompt.training.teacher_answers import answers_file
from softprompt.utils.errors import ConfigError, DataError, OutputError, TrainingError
from softprompt.utils.torchrun_env import launch_ids, launched_by_torchrun

MAY_DIFFER = {  # settings that may differ between ranks: paths, which depend on the machine, and the day
    "chat_template_date",
    *("model_name_or_path", "device", "offload_folder", "dataset", "eval_dataset", "init_adapter", "output_dir"),
    *("resume_from_checkpoint", "overwrite_output_dir", "overwrite_cache", "preprocessing_num_workers"),
}


class Observer:
    """Called by a run on rank 0. It does what the training package does not know about: the report and the upload. By
    default nothing happens."""

    def check(self, config: TrainConfig, output_dir: Path) -> None:
        """Raise SoftpromptError for what would fail after training. Called before any row is read."""

    def begin(self, run: Run, callbacks: RunCallbacks) -> None:
        """The base has been evaluated, and training is about to start."""

    def end(self, run: Run, callbacks: RunCallbacks) -> Run:
        """The run has ended and is written. Return it, possibly with added fields."""
        return run


def run_training(
    config: TrainConfig, world: World | None = None, observer: Observer | None = None, began: float | None = None
) -> Run:
    """Train as `config` says, and describe progress on stdout. Nothing is written before everything is loaded and
    checked on all ranks.

    Raises:
        SoftpromptError: The settings, the data, the base or the output folder prevent the run, or the run failed or was
            stopped.
    """
    if config.training.dry_run:
        raise ConfigError("dry_run=True trains nothing; from Python, print softprompt.training.dry_run.dry_run(config)")
    began = time.monotonic() if began is None else began
    if world is None:
        with process_group() as world:
            return run_training(config, world, observer, began)
    observer = observer or Observer()
    starts = world.all_gather(launch_ids()) if launched_by_torchrun() else []
    config = with_auto_resume(config, world.all_gather(has_saved(config, starts))[0])
    setup = world.run_on_all(lambda: set_up(config, world, observer.check, began))
    world.run_on_all(lambda: _refuse_unlike(world.all_gather(_known_by(setup))))
    args = setup.config.training
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest(time_limit(setup.config), began))
        output_dir = Path(world.all_gather(str(world.run_on_all(lambda: _claimed(setup, world, stack))))[0])
        stack.enter_context(crashes_in(output_dir))
        stack.enter_context(deterministic(args.deterministic))
        return _train(setup, output_dir, world, stop, starts, observer)


def set_up(
    config: TrainConfig,
    world: World,
    check: Callable[[TrainConfig, Path], None] | None = None,
    began: float | None = None,
) -> Setup:
    """Load everything that a run needs, and choose its engine. Every rank must call this; nothing is written.

    Raises:
        SoftpromptError: The settings, the data, the base or the output folder prevent the run.
    """
    # Engines may communicate with those of other ranks, so all ranks must have loaded their parts before.
    start, output_dir, data, base, prompt, answers = world.run_on_all(lambda: load_run(config, world, check, began))
    classifier = None if answers else world.run_on_all(lambda: held_out_classifier(data, base.model))
    engine, generator, how = make_engines(start.config, base, data, prompt, world, classifier)
    print_model(start.config, PromptTunedModel(prompt, base.model), engine, how)
    print_steps(start.config, data.loader, world.size, output_dir, start.searches_learning_rate)
    if answers:
        engine, evaluator = distilled(start.config, answers, base, cast(MicrobatchEngine[Any], engine))
    else:
        evaluator = make_evaluator(start.config, data, base.model, engine, generator, classifier)
    no_answers = None if generator else why_not_generate(base.model)
    known = RunAnswers(answers_file(answers.teacher.source.kept), answers.metrics) if answers else None
    return Setup(start, output_dir, data, base.model, prompt, engine, evaluator, no_answers, known)


def _train(
    setup: Setup,
    output_dir: Path,
    world: World,
    request: StopRequest,
    starts: Sequence[Sequence[str]],
    observer: Observer,
) -> Run:
    with torch.no_grad():
        for parameter in setup.prompt.trained_parameters().values():
            parameter.copy_(world.broadcast(parameter))
    setup.prompt.fold()
    stop = world.share_stop_request(request)
    if setup.start.searches_learning_rate:
        setup = with_found_rate(setup, stop)
    setup = setup._replace(output_dir=output_dir)
    callbacks = RunCallbacks(setup, world, stop, starts)
    observer = observer if world.is_main else Observer()
    callbacks.print_start()
    try:
        with callbacks.log:
            observer.begin(callbacks.begin(), callbacks)
            start = setup.start
            train(
                setup.engine,
                setup.prompt,
                setup.data.loader,
                start.config.training,
                start.config.training.learning_rate,
                callbacks,
                start.state,
            )
            callbacks.stop_if_asked()
            return observer.end(callbacks.finish(), callbacks)
    except TrainingError as error:
        raise TrainingError(f"{error}; {way_on(output_dir)}") from None
    except DataError as error:  # a row of a stream that cannot be read
        raise DataError(f"{error}; correct the row; {way_on(output_dir, ignore_data_skip=True)}") from None


def _claimed(setup: Setup, world: World, stack: ExitStack) -> Path:
    """Return the output folder. Rank 0 creates it, locks it, and removes the files of a run that is overwritten."""
    if not world.is_main:
        return setup.output_dir
    checkpoint = setup.start.checkpoint
    folder = stack.enter_context(claim_output_dir(setup.config, setup.output_dir, checkpoint)).folder
    try:
        tidy(folder)
        if not continues_in(folder, checkpoint):
            remove_run(folder)
    except OSError as error:
        raise OutputError(
            f"--output_dir {folder}: cannot be written to ({error.strerror}); name another folder"
        ) from None
    return folder


def _known_by(setup: Setup) -> dict[str, Any]:
    """Return what must be equal on all ranks: all settings except MAY_DIFFER, the starting point, and the contents of
    rows, tokenizer and base."""
    flags = {f"--{name}": value for name, value in setup.config.as_dict().items() if name not in MAY_DIFFER}
    loader = setup.data.loader
    begun = {"last step done": setup.start.state.step, "number of steps": loader.total_steps}
    return {**begun, "number of rows in a step": loader.rows_per_step, **flags, **setup.start.fingerprints}


def _refuse_unlike(ranks: Sequence[Mapping[str, Any]]) -> None:
    """Raise ConfigError if `_known_by` differs between a rank and rank 0, for example because the nodes' disks hold
    different files."""
    for rank, known in enumerate(ranks):
        if unlike := [what for what in known if known[what] != ranks[0].get(what)]:
            raise ConfigError(
                f"rank {rank} has another {' and another '.join(unlike)} than rank 0; give all nodes the same command, "
                "and folders that all of them see, or equal copies"
            )
