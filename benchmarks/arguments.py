"""The command-line flags of the benchmarks: a wrong value is refused in one line, before anything is measured."""

import argparse
from typing import Any, NoReturn


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, except that whole numbers (`type=int`) must be above 0, and that an error is one line."""

    def __init__(self, description: str, **settings: Any):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        self.register("type", int, positive_int)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help lists the flags\n")


def positive_int(text: str) -> int:
    return _at_least(1, text)


def seed(text: str) -> int:
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return number
