"""The project's own exceptions. Each carries one message of one line that names what is wrong, what was expected and
what to do; `train.py` and `infer.py` print that line and exit with the exception's `exit_code`."""

import signal

from softprompt.utils.redact import redacted


class SoftpromptError(Exception):
    """Anything that a user can mend. `exit_code` 2 means: refused before anything was written, or, for a row in the
    middle of a stream, before anything came of it."""

    exit_code = 2

    def __init__(self, message: str):
        super().__init__(redacted(message))  # it may quote a library's, with the address of a hub in it


class ConfigError(SoftpromptError):
    """A flag, a field of a config file, or a combination of them."""


class DataError(SoftpromptError):
    """A dataset: its place, its format, one of its rows."""


class ModelError(SoftpromptError):
    """A base model or its tokenizer: not there, not loadable, not fit for soft prompts."""


class AdapterError(SoftpromptError):
    """An adapter folder: files that are absent, broken, of another kind or of another size."""


class CheckpointError(SoftpromptError):
    """A checkpoint that a run cannot go on from: broken, or of another run."""


class Stopped(SoftpromptError):
    """A run that was asked to stop and has saved what it did; no fault. `exit_code` says who asked."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class OtherRankError(SoftpromptError):
    """What another rank of a distributed run met, with its exit code; rank 0 tells it."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class OutputError(SoftpromptError):
    """A place to write to that cannot be written to."""


class ReportError(SoftpromptError):
    """A run that cannot be reported: not there, no run, without metrics, or with broken files."""


class PushError(SoftpromptError):
    """An upload to the hub that failed; the run that was to be uploaded is whole."""

    exit_code = 1


class PartialFailureError(SoftpromptError):
    """Some of many that are independent of each other, as the cells of a study; what could be done without them is
    done."""

    exit_code = 1


class TrainingError(SoftpromptError):
    """A run that cannot go on."""

    exit_code = 1


class NonFiniteError(TrainingError):
    """A loss, a gradient or a prompt that is not finite: of all ranks of a run, as they have the same numbers."""


SIGNAL_EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}  # as shells report them
TIMEOUT_EXIT_CODE = 124  # as timeout(1) has it
EXIT_CODES = (*SIGNAL_EXIT_CODES.values(), TIMEOUT_EXIT_CODE)
