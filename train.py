"""Learn a soft prompt for a frozen language model: `python train.py`, or see `python train.py --help`."""

from collections.abc import Sequence

from softprompt.cli import command, parse_training
from softprompt.errors import PushError


def main(argv: Sequence[str]) -> None:
    config = parse_training(argv)

    from softprompt.distributed import joined  # after parsing: a wrong flag need not wait for torch
    from softprompt.dry_run import dry_run
    from softprompt.run import run_training
    from softprompt.summary import summary

    with joined() as world:
        if config.training.dry_run:
            print(dry_run(config, world))
            return
        run = run_training(config, world)
        print(summary(run))
    if run.not_pushed:
        raise PushError(run.not_pushed)


if __name__ == "__main__":
    command(main)
