"""What the loop is fed with: the rows of each optimizer step, and where they end. Here, rows that are all at hand."""

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
    """The rows of one optimizer step, and what an error calls them. `epoch` is the number of passes over all rows done
    after it, as a fraction; with the last rows of one it `ends_epoch`. `position` is where its feed goes on."""

    examples: Sequence[Example]
    places: Sequence[str]
    epoch: float
    ends_epoch: bool
    position: Position


class WindowLoader(Protocol):
    """Rows in windows of `rows_per_step`; `places` is what errors say of the windows' places, a format string."""

    @property
    def rows_per_step(self) -> int: ...
    @property
    def places(self) -> str: ...
    @property
    def rows(self) -> int | None:
        """Of one pass, as far as is known; None where it is not."""
        ...

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run; fewer only where rows of a stream turn out to have no target."""
        ...

    def windows(self, step: int = 0, position: Position = BEGINNING) -> Generator[Window, None, None]:
        """Those after `step` optimizer steps, the last of which left `position`, without end.

        Raises:
            DataError: a row that cannot be read, after the windows before it.
        """
        ...

    def is_over(self, step: int, position: Position) -> bool:
        """Whether the run has made all its steps."""
        ...

    def told(self, position: Position) -> str:
        """What was found in the rows up to there, where it could not be told beforehand."""
        ...


def rows_of_a_step(args: TrainingArguments, devices: int = 1) -> int:
    """Rows of an optimizer step: devices × batch × accumulation, as TrainingArguments means them."""
    return devices * args.per_device_train_batch_size * args.gradient_accumulation_steps


def total_steps(rows: int, args: TrainingArguments, rows_per_step: int | None = None) -> int:
    """Optimizer steps T of a run: `max_steps`, else ceil(epochs × windows per epoch), as in Trainer."""
    per_epoch = steps_per_epoch(rows, rows_per_step or rows_of_a_step(args))
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)


def epochs_done(step: int, n_examples: int, args: TrainingArguments, rows_per_step: int) -> float:
    """Passes over the rows after this many optimizer steps, counted in micro-batches, as Trainer logs them."""
    micro = math.ceil(n_examples * args.gradient_accumulation_steps / rows_per_step)
    whole, part = divmod(step, math.ceil(micro / args.gradient_accumulation_steps))
    return whole + min(part * args.gradient_accumulation_steps, micro) / micro


@dataclass(frozen=True)
class ListLoader:
    """All examples of a run, in Trainer's order; the number of steps is the position. `per_step` are rows of an
    optimizer step, those of one device where it is not given."""

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

    def told(self, position: Position) -> str:
        return ""
