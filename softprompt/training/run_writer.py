"""Write a run's checkpoints and results into its output folder. Files that the run did not write are left alone."""

import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from softprompt.runs.manifest import Manifest
from softprompt.runs.run_files import own_checkpoint, remove_old_checkpoints
from softprompt.utils.atomic_io import write_folder
from softprompt.utils.errors import TrainingError


class RunWriter:
    """Writes into `output_dir`; `say` prints a line above the progress bar.

    If a file cannot be written, a TrainingError with a one-line message names the file and the reason.
    """

    def __init__(self, output_dir: Path, say: Callable[[str], object]):
        self.output_dir, self.say = output_dir, say
        self._named: set[str] = set()  # foreign files in checkpoints that a warning has named already

    def write_checkpoint(self, step: int, files: Mapping[str, bytes], limit: int | None, best: int | None) -> None:
        """Write checkpoint-`step`, then remove the checkpoints that `checkpoints.surplus` names: those of later steps,
        and the oldest above `limit` (None: keep all), except that of step `best`."""
        with self._writing(f"checkpoint-{step}"):
            write_folder(own_checkpoint(self.output_dir, step), files)
        try:
            foreign = remove_old_checkpoints(self.output_dir, step, limit, best)
        except OSError as error:
            self.say(f"warning: an old checkpoint cannot be removed ({error.strerror})")
            return
        if new := [name for name in foreign if name not in self._named]:
            self._named.update(new)
            self.say(f"warning: {', '.join(new)}: this run did not write it, so the checkpoint that holds it is kept")

    def write_beside_checkpoints(self, files: Mapping[str, bytes], what: str) -> None:
        """Write files into the run's folder; errors call them `what`."""
        with self._writing(what):
            Manifest(self.output_dir).write(dict(files))

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        try:
            if not self.output_dir.is_dir():
                raise FileNotFoundError(errno.ENOENT, "the folder is gone", str(self.output_dir))
            yield
        except OSError as error:
            reason = error.strerror or type(error).__name__
            where = error.filename or self.output_dir
            raise TrainingError(f"{what} cannot be written: {where}: {reason}") from None
