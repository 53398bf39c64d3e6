"""Run a command by `python -m softprompt COMMAND …`; see softprompt.cli."""

from softprompt.cli import main

if __name__ == "__main__":
    main()
