"""One training run: what is prepared is trained, evaluated before and after, and written."""

from dataclasses import replace

from softprompt.build import claim_output_dir
from softprompt.config import TrainConfig
from softprompt.crash import crashes_in
from softprompt.determinism import deterministic
from softprompt.errors import ConfigError, TrainingError
from softprompt.prepare import Prepared, prepare
from softprompt.recorder import Recorder, Run
from softprompt.resume import way_on
from softprompt.stopping import StopRequest, seconds_of
from softprompt.trainer import train

SAMPLED = 100  # rows among which the shortest becomes the question to try


def run_training(config: TrainConfig) -> Run:
    """Train as `config` says, telling what happens; nothing is written before everything is loaded and checked.

    Raises:
        SoftpromptError: as of `prepare`, or a run that cannot go on.
    """
    if config.training.dry_run:
        raise ConfigError("dry_run=True trains nothing; from Python, print softprompt.dry_run.dry_run(config)")
    run = prepare(config)
    args = run.config.training
    with (
        StopRequest(seconds_of(args.max_time) if args.max_time else None) as request,
        claim_output_dir(run.config, run.output_dir, run.checkpoint) as lock,
        crashes_in(lock.folder),
        deterministic(args.deterministic),
    ):
        return _trained(replace(run, output_dir=lock.folder), request)


def _trained(run: Prepared, request: StopRequest) -> Run:
    recorder = Recorder(run, request)
    recorder.tell_start()
    try:
        with recorder.progress:
            recorder.begin()
            args, peak = run.config.training, run.config.learning_rate
            train(run.engine, run.prompt, run.data.examples, args, peak, recorder, run.start)
            recorder.stop_if_asked()
            return recorder.finish(min(run.rows[:SAMPLED], key=lambda row: len(str(row))))
    except TrainingError as error:
        raise TrainingError(f"{error}; {way_on(run.output_dir)}") from None
