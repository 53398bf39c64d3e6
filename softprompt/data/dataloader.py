"""Loaders: they yield the examples of each optimizer step. This module holds the one for examples in memory."""

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from softprompt.config.train_args import TrainingArguments
from softprompt.data.sampler import steps_per_epoch, windows
from softprompt.data.tokenization import Example

Position = Mapping[str, Any]  # JSON-able
BEGINNING: Position = {}


class Window(NamedTuple):
    """The examples of one optimizer step.

    `places` name their rows in error messages. `epoch` is the number of passes over all rows after this step, as a
    fraction. `ends_epoch` is True for the last window of a pass. `position` is where the loader resumes after it.
    """

    examples: Sequence[Example]
    places: Sequence[str]
    epoch: float
    ends_epoch: bool
    position: Position


class WindowLoader(Protocol):
    """Yields examples in windows of `rows_per_step`. `places` is a format string for a window's places in errors."""

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
        """Optimizer steps of the run. There may be fewer if rows of a stream turn out to have no target."""
        ...

    def windows(self, step: int = 0, position: Position = BEGINNING) -> Generator[Window, None, None]:
        """Yield windows without end, starting after `step` optimizer steps; the last of them had this `position`.

        Raises:
            DataError: a row cannot be read; the windows before it are yielded first.
        """
        ...

    def is_over(self, step: int, position: Position) -> bool:
        """Whether the run has done all its steps."""
        ...

    def describe_rows_read(self, position: Position) -> str:
        """Count the rows read up to `position` that were cut or left out; empty if that was known beforehand."""
        ...


def rows_of_a_step(args: TrainingArguments, devices: int = 1) -> int:
    """Rows of an optimizer step: devices × batch size × gradient accumulation, as in Trainer."""
    return devices * args.per_device_train_batch_size * args.gradient_accumulation_steps


def total_steps(rows: int, args: TrainingArguments, rows_per_step: int | None = None) -> int:
    """Optimizer steps T of a run: `max_steps`, else ceil(epochs × windows per epoch), as in Trainer."""
    per_epoch = steps_per_epoch(rows, rows_per_step or rows_of_a_step(args))
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)


def epochs_done(step: int, n_examples: int, args: TrainingArguments, rows_per_step: int) -> float:
    """The epoch after `step` optimizer steps, counted in micro-batches as Trainer logs it."""
    micro = math.ceil(n_examples * args.gradient_accumulation_steps / rows_per_step)
    whole, part = divmod(step, math.ceil(micro / args.gradient_accumulation_steps))
    return whole + min(part * args.gradient_accumulation_steps, micro) / micro


@dataclass(frozen=True)
class ListLoader:
    """Yields examples that are all in memory (or memory-mapped), in Trainer's order.

    The order follows from the seed, so the number of steps alone is the position. `per_step` is the number of rows of
    an optimizer step, by default that of one device.
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
