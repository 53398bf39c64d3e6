"""The package's exceptions.

Each message is one line that names the fault, what was expected, and what to do. `train.py` and `infer.py` print it and
exit with the exception's `exit_code`.
"""

import signal
from typing import Any

from softprompt.utils.redact import redacted


class SoftpromptError(Exception):
    """An error that the user can correct. Secrets are redacted from its message, which may quote a library.

    `exit_code` 2 means that nothing had been written when the error was found. For an invalid row of a stream, it means
    that no training step had used the row.
    """

    exit_code = 2

    def __init__(self, message: str):
        super().__init__(redacted(message))

    def _render_traceback_(self) -> list[str]:
        """Return what IPython and Jupyter show in place of a traceback: one line, as the command line does."""
        return [f"{type(self).__name__}: {' '.join(str(self).split())}"]


class ConfigError(SoftpromptError):
    """A wrong flag, a wrong field of a config file, or a combination that is not allowed."""


class DataError(SoftpromptError):
    """A dataset that cannot be found or read, or one of its rows that is invalid."""


class ModelError(SoftpromptError):
    """A base model or tokenizer that cannot be found, cannot be loaded, or cannot use soft prompts."""


class AdapterError(SoftpromptError):
    """An adapter folder whose files are missing or broken, or belong to another kind of adapter or another base."""


class CheckpointError(SoftpromptError):
    """A checkpoint that is broken or belongs to another run, so that training cannot resume from it."""


class Stopped(SoftpromptError):
    """Not a fault: a run was asked to stop, and has saved its state. `exit_code` identifies the signal or limit, and
    `run` is the `training.result.Run` as it was saved; None if nothing was to be saved."""

    def __init__(self, message: str, exit_code: int, run: Any = None):
        super().__init__(message)
        self.exit_code, self.run = exit_code, run


class OtherRankError(SoftpromptError):
    """An error of another rank of a distributed run, with that rank's exit code; only rank 0 prints it."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class OutputError(SoftpromptError):
    """An output file or folder that cannot be written to."""


class ReportError(SoftpromptError):
    """A run that cannot be reported: it is missing, has no metrics, or has broken files."""


class PushError(SoftpromptError):
    """An upload to the hub failed; the run itself is complete."""

    exit_code = 1


class PartialFailureError(SoftpromptError):
    """Some of several independent tasks failed, such as cells of a study; all others were completed."""

    exit_code = 1


class TrainingError(SoftpromptError):
    """A run that cannot continue."""

    exit_code = 1


class NonFiniteError(TrainingError):
    """A loss, a gradient or a prompt is not finite. All ranks raise it together: they compute the same values."""


class OutOfMemoryError(TrainingError):
    """Memory does not suffice even for one row at a time."""


SIGNAL_EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}  # 128 + the signal's number, as in shells
TIMEOUT_EXIT_CODE = 124  # as timeout(1) returns
EXIT_CODES = (*SIGNAL_EXIT_CODES.values(), TIMEOUT_EXIT_CODE)


def loading_error(what: str, name_or_path: str, error: BaseException) -> ModelError:
    """Return the ModelError for a file of a base that a library cannot load.

    Args:
        what: What is loaded: "base model" or "tokenizer".
        error: The library's error.
    """
    reason = first_line(error).rstrip(".")
    if isinstance(error, ImportError):
        return ModelError(
            f"{what} {name_or_path!r} cannot be loaded: {reason}; install it, or give --model_name_or_path another one"
        )
    return ModelError(
        f"{what} {name_or_path!r} cannot be loaded: {reason}; check its files, or give --model_name_or_path another one"
    )


def first_line(error: BaseException, limit: int = 200) -> str:
    """Return the first line of a library's error message, truncated to `limit` characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:limit].rstrip()
