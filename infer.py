"""Answer questions with a learned prompt: `python infer.py --prompt "…"`. `--help` explains the flags."""

from softprompt.cli import infer as main
from softprompt.cli import run_command

if __name__ == "__main__":
    run_command(main, prints_answers=True)
