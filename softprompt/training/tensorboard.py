"""Write metrics for TensorBoard under Trainer's tags: train/loss, train/learning_rate, train/grad_norm, eval/loss, …"""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from softprompt.runs.manifest import Manifest
from softprompt.runs.own_files import EVENTS_FOLDER, events_in
from softprompt.runs.state import Metrics
from softprompt.utils.errors import ConfigError
from softprompt.utils.redact import redacted


def check_installed() -> None:
    """Raise ConfigError if tensorboard is not installed."""
    if find_spec("tensorboard") is None:
        raise ConfigError(
            "--report_to tensorboard needs the package tensorboard: pip install tensorboard "
            '(or pip install -e ".[tensorboard]")'
        )


class TensorBoardLog:
    """Writes event files into one folder, so that the curves of a resumed run continue the earlier ones. If they cannot
    be written, a warning is printed once and training continues without TensorBoard."""

    def __init__(self, output_dir: Path, arguments: Mapping[str, Any]):
        self.output_dir, self.folder, self.arguments = output_dir, output_dir / EVENTS_FOLDER, arguments
        self.say: Callable[[str], object] = print
        self.writer: Any = None

    def start(self, history: Sequence[Metrics], step: int, say: Callable[[str], object]) -> None:
        """Continue after `step`. Events of later steps are purged, since a resumed run repeats these steps. If there
        are no event files yet, the records of `history` are written. `say` prints warnings."""
        self.say = say
        from torch.utils.tensorboard import SummaryWriter

        def begin() -> None:
            known = set(events_in(self.output_dir))
            self.writer = SummaryWriter(str(self.folder), purge_step=step + 1 if known and step else None)
            Manifest(self.output_dir).own(set(events_in(self.output_dir)) - known)
            if not known:
                rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in self.arguments.items())
                self.writer.add_text("args", redacted(f"| argument | value |\n|---|---|\n{rows}"), 0)
                for record in history:
                    self._add(record)
            self.writer.flush()

        self._try(begin)

    def log(self, record: Metrics) -> None:
        """Write the numbers of a metrics record at its step."""

        def write() -> None:
            self._add(record)
            self.writer.flush()

        if self.writer:
            self._try(write)

    def close(self) -> None:
        """Close the event file."""
        if self.writer:
            self._try(self.writer.close)

    def _add(self, record: Metrics) -> None:
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                self.writer.add_scalar(tag(name), value, record["step"])

    def _try(self, write: Callable[[], object]) -> None:
        try:
            write()
        except Exception as error:  # the writer's thread may raise any error of the disk
            self.writer = None
            self.say(f"warning: {self.folder} cannot be written ({error}); training goes on without TensorBoard")


def _cell(value: object) -> str:
    """Return a value as a cell of a Markdown table."""
    return str(value).replace("\n", "\\n").replace("|", "\\|")


def tag(name: str) -> str:
    """Return the tag that transformers' TensorBoardCallback gives to a metric."""
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
