"""Learn a soft prompt for a frozen language model: `python train.py`, or see `python train.py --help`."""

from softprompt.cli import run_command
from softprompt.cli import train as main

if __name__ == "__main__":
    run_command(main)
