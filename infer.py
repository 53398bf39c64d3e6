"""Ask a frozen language model with a learned prompt: `python infer.py --prompt "…"`; see `python infer.py --help`."""

from collections.abc import Sequence

from softprompt.cli import command, parse_inference


def main(argv: Sequence[str]) -> None:
    config = parse_inference(argv)

    from softprompt.inference import infer  # after parsing: a wrong flag need not wait for torch

    infer(config)


if __name__ == "__main__":
    command(main, prints_answers=True)
