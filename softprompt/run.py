"""One training run: what is prepared is trained, evaluated before and after, and written."""

from softprompt.config import TrainConfig
from softprompt.errors import ConfigError
from softprompt.prepare import prepare
from softprompt.recorder import Recorder, Run
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
    if run.start.step:
        done = "; all of them are done" if run.start.step >= run.total_steps else ""
        print(f"resuming after step {run.start.step:,} of {run.total_steps:,}{done}")
    args, learning_rate = run.config.training, run.config.learning_rate
    with StopRequest(seconds_of(args.max_time) if args.max_time else None) as request:
        recorder = Recorder(run, request)
        with recorder.progress:
            recorder.begin()
            train(run.engine, run.prompt, run.data.examples, args, learning_rate, recorder, run.start)
            recorder.stop_if_asked()
            return recorder.finish(min(run.rows[:SAMPLED], key=lambda row: len(str(row))))
