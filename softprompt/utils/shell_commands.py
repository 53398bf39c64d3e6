"""Commands to print, which a POSIX shell can run unchanged in the working directory of this process."""

import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from importlib.machinery import PathFinder
from typing import Any

SCRIPTS = ("train.py", "infer.py")  # exist beside the package in a clone, but not in an installed package


def program_name(name: str) -> str:
    """Return what was typed to start the command `name`, for its usage line: `train.py`, `softprompt train` or
    `python -m softprompt train`."""
    started = os.path.basename(sys.argv[0])
    if started in SCRIPTS:
        return started
    return f"python -m softprompt {name}" if started == "__main__.py" else f"softprompt {name}"


def command(name: str, launcher: str = "python") -> str:
    """Return the beginning of a shell command that runs the command `name` of softprompt.

    It starts the command as this process was started: by the script beside train.py or infer.py, by the installed
    `softprompt`, else by `python -m softprompt`. `launcher` replaces `python`, to start several processes by torchrun.
    """
    folder, started = os.path.split(sys.argv[0])
    if started in SCRIPTS:
        if f"{name}.py" in SCRIPTS:
            return f"{launcher} {shlex.quote(os.path.join(folder, f'{name}.py'))}"
        importable = not folder or PathFinder.find_spec("softprompt", sys.path[1:]) is not None
        return f"{'' if importable else f'PYTHONPATH={shlex.quote(folder)} '}{launcher} -m softprompt {name}"
    if started == "softprompt" and launcher == "python":
        on_path = shutil.which(started)
        same = on_path is not None and os.path.realpath(on_path) == os.path.realpath(sys.argv[0])
        return f"{started if same else shlex.quote(sys.argv[0])} {name}"
    return f"{launcher} -m softprompt {name}"


def train_call(settings: Mapping[str, Any]) -> str:
    """Return how to train with these settings: a shell command, or a call of `softprompt.train` if no program of
    softprompt started this process."""
    folder, started = os.path.split(sys.argv[0])
    if started in (*SCRIPTS, "softprompt") or (started == "__main__.py" and os.path.basename(folder) == "softprompt"):
        return command("train") + flags(settings)
    return f"softprompt.train({', '.join(f'{name}={value!r}' for name, value in settings.items())})"


def flags(settings: Mapping[str, Any]) -> str:
    """Return the settings as flags, each with a space before it; a switch that is on has no value."""
    return "".join(f" --{name}" if value is True else flag(name, str(value)) for name, value in settings.items())


def flag(name: str, value: str) -> str:
    """Return ` --NAME VALUE`, or ` --NAME=VALUE` for a value that argparse would take for another flag."""
    return f" --{name}{'=' if value.startswith('-') else ' '}{_quoted(value)}"


def argument(path: str) -> str:
    """Return a path as a positional argument."""
    return _quoted(os.path.join(".", path) if path.startswith("-") else path)


def _quoted(text: str) -> str:
    """Quote `text` for a shell. Use double quotes, which non-POSIX shells understand too, unless `text` has a character
    that is special inside them."""
    if shlex.quote(text) == text or set(text) & set('"$`\\!'):
        return shlex.quote(text)
    return f'"{text}"'
