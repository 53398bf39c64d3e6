"""Learn a soft prompt for a frozen language model. `python train.py --help` explains the flags."""

from softprompt.cli import run_command
from softprompt.cli import train as main

if __name__ == "__main__":
    run_command(main)
