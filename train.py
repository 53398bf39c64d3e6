"""Learn a soft prompt for a frozen language model: `python train.py`, or see `python train.py --help`."""

from collections.abc import Sequence

from softprompt.cli import command, parse_training


def main(argv: Sequence[str]) -> None:
    config = parse_training(argv)

    from softprompt.distributed import joined  # after parsing: a wrong flag need not wait for torch
    from softprompt.dry_run import dry_run
    from softprompt.run import run_training
    from softprompt.summary import summary

    with joined() as world:
        print(dry_run(config, world) if config.training.dry_run else summary(run_training(config, world)))


if __name__ == "__main__":
    command(main)
