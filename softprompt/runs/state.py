"""What the training loop hands to its callbacks, and the state that a checkpoint keeps of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from softprompt.data.dataloader import Position

Metrics = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One optimizer step, counted from 1: mean loss over its targets, gradient norm before clipping, the learning rate
    it used, its real tokens and seconds. `epoch` is the number of passes done, as a fraction. `loss` and `grad_norm`
    are finite; None stands for a value that was not, which only a step that the GradScaler skipped has."""

    number: int
    epoch: float
    loss: float | None
    grad_norm: float | None
    learning_rate: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class TrainingState:
    """Where the loop stands after `step` optimizer steps, of which `taken` moved the schedule: what it needs to go on
    as if it had not stopped. `optimizer` holds AdamW's moments [P, H] fp32 and its step count; `rng` the states of
    torch's generators (uint8), by device type; `position` is what the feed left, beside the step."""

    step: int = 0
    taken: int = 0
    unlogged: Sequence[Step] = ()
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)
    scaler: Mapping[str, Any] = field(default_factory=dict)
    rng: Mapping[str, Tensor] = field(default_factory=dict)
    position: Position = field(default_factory=dict)
