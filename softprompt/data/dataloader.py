"""The interface of loaders, which yield the examples of each optimizer step, and the loader for examples in memory."""

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from softprompt.config.train_args import TrainingArguments
from softprompt.data.sampler import steps_per_epoch, windows
from softprompt.data.tokenization import Example

Position = Mapping[str, Any]  # of JSON types
BEGINNING: Position = {}


class Window(NamedTuple):
    """The examples of one optimizer step.

    `places` name the rows of the examples in error messages. `epoch` is the number of passes over all rows after this
    step, as a fraction. `ends_epoch` is True for the last window of a pass. `position` tells a loader where to resume
    after this step.
    """

    examples: Sequence[Example]
    places: Sequence[str]
    epoch: float
    ends_epoch: bool
    position: Position


class WindowLoader(Protocol):
    """Yields examples in windows of `rows_per_step` rows. `places` is a format string into which error messages put the
    places of a window."""

    @property
    def rows_per_step(self) -> int: ...
    @property
    def places(self) -> str: ...
    @property
    def rows(self) -> int | None:
        """The number of rows of one pass; None if it is not known."""
        ...

    @property
    def total_steps(self) -> int:
        """The number of optimizer steps of the run. A stream may take fewer if some of its rows have no target."""
        ...

    def windows(self, step: int = 0, position: Position = BEGINNING) -> Generator[Window, None, None]:
        """Yield windows without end, starting after `step` optimizer steps; `position` is that of the window of the
        last of these steps.

        Raises:
            DataError: A row cannot be read; the full windows before it are yielded first.
        """
        ...

    def is_over(self, step: int, position: Position) -> bool:
        """Whether the run has done all its steps."""
        ...

    def describe_rows_read(self, position: Position) -> str:
        """Describe how many of the rows read up to `position` were truncated or left out. Return an empty text if this
        was known before the run."""
        ...


def rows_of_a_step(args: TrainingArguments, devices: int = 1) -> int:
    """Return the number of rows of an optimizer step: devices × batch size × gradient accumulation, as in Trainer."""
    return devices * args.per_device_train_batch_size * args.gradient_accumulation_steps


def total_steps(rows: int, args: TrainingArguments, rows_per_step: int | None = None) -> int:
    """Return the number of optimizer steps of a run: `max_steps` if it is positive, else ceil(epochs × steps per
    epoch), as in Trainer."""
    per_epoch = steps_per_epoch(rows, rows_per_step or rows_of_a_step(args))
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)


def epochs_done(step: int, n_examples: int, args: TrainingArguments, rows_per_step: int) -> float:
    """Return the epoch after `step` optimizer steps as Trainer logs it: as a fraction, counted in micro-batches."""
    micro = math.ceil(n_examples * args.gradient_accumulation_steps / rows_per_step)
    whole, part = divmod(step, math.ceil(micro / args.gradient_accumulation_steps))
    return whole + min(part * args.gradient_accumulation_steps, micro) / micro


@dataclass(frozen=True)
class ListLoader:
    """Yields examples that are all in memory (or memory-mapped), in Trainer's order.

    The order depends only on the seed, so loading resumes from the number of steps alone. `per_step` is the number of
    rows of an optimizer step, by default that of one device.
    """

    examples: Sequence[Example]
    args: TrainingArguments
    per_step: int | None = None
    places = "training rows {}, counted from 0 among those that have a target"

    @property
    def rows_per_step(self) -> int:
        return self.per_step or rows_of_a_step(self.args)

    @property
    def rows(self) -> int:
        return len(self.examples)

    @property
    def total_steps(self) -> int:
        return total_steps(self.rows, self.args, self.rows_per_step)

    def windows(self, step: int = 0, position: Position = BEGINNING) -> Generator[Window, None, None]:
        n, each = self.rows, self.rows_per_step
        per_epoch = steps_per_epoch(n, each)
        for number, rows in enumerate(windows(n, each, self.args.seed, step), start=step + 1):
            epoch = epochs_done(number, n, self.args, each)
            window = [self.examples[row] for row in rows]
            yield Window(window, [str(row) for row in rows], epoch, number % per_epoch == 0, BEGINNING)

    def is_over(self, step: int, position: Position) -> bool:
        return step >= self.total_steps

    def describe_rows_read(self, position: Position) -> str:
        return ""
