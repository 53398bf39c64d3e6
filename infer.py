"""Ask a frozen language model with a learned prompt: `python infer.py --prompt "…"`; see `python infer.py --help`."""

from softprompt.cli import infer as main
from softprompt.cli import run_command

if __name__ == "__main__":
    run_command(main, prints_answers=True)
