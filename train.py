"""Learn a soft prompt for a frozen language model: `python train.py`, or see `python train.py --help`."""

from collections.abc import Sequence

from softprompt.cli import command, parse_training


def main(argv: Sequence[str]) -> None:
    config = parse_training(argv)

    from softprompt.dry_run import dry_run  # after parsing: a wrong flag need not wait for torch
    from softprompt.run import run_training
    from softprompt.summary import summary

    print(dry_run(config) if config.training.dry_run else summary(run_training(config)))


if __name__ == "__main__":
    command(main)
