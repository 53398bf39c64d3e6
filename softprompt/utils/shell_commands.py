"""Commands as they are printed: a POSIX shell runs them as they stand, from the folder that this process runs in."""

import os
import shlex
import sys
from importlib.machinery import PathFinder

TRAIN = "train.py"


def script(name: str) -> str:
    """The path of one of the programs beside train.py, as train.py's own was given to this process."""
    return shlex.quote(os.path.join(os.path.dirname(_program()), name))


def command(name: str) -> str:
    """`python -m softprompt NAME`, with the folder of train.py in PYTHONPATH if Python finds the package only there."""
    folder = os.path.dirname(_program())
    found = not folder or PathFinder.find_spec("softprompt", sys.path[1:]) is not None
    return f"{'' if found else f'PYTHONPATH={shlex.quote(folder)} '}python -m softprompt {name}"


def flag(name: str, value: str) -> str:
    """` --NAME VALUE`; one that starts with - would be taken for a flag of its own."""
    return f" --{name}{'=' if value.startswith('-') else ' '}{quoted(value)}"


def argument(path: str) -> str:
    """A path that is no flag's value."""
    return quoted(os.path.join(".", path) if path.startswith("-") else path)


def quoted(text: str) -> str:
    """For a shell, in double quotes where nothing within them has a meaning of its own: other shells know them, too."""
    if shlex.quote(text) == text or set(text) & set('"$`\\!'):
        return shlex.quote(text)
    return f'"{text}"'


def _program() -> str:
    return sys.argv[0] if os.path.basename(sys.argv[0]) == TRAIN else ""
