"""What the training loop hands to its callbacks, and the state that a checkpoint keeps of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from softprompt.data.dataloader import Position

Metrics = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        number: counted from 1.
        epoch: passes over the rows after this step, as a fraction.
        loss: the mean over the targets of the step; None if it is not finite, which only a step has that the GradScaler
            skipped.
        grad_norm: the gradient's norm before clipping; None as for `loss`.
        learning_rate: the one that the step used.
        tokens: real tokens, without padding and virtual tokens.
        seconds: wall-clock time.
    """

    number: int
    epoch: float
    loss: float | None
    grad_norm: float | None
    learning_rate: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class TrainingState:
    """What the loop needs to continue as if it had not stopped.

    Attributes:
        step: optimizer steps done.
        taken: those that the GradScaler did not skip; the learning rate schedule counts only these.
        unlogged: steps since the last log record.
        optimizer: AdamW's moments [P, H] fp32 and its step count.
        scaler: the state of the GradScaler; empty without fp16.
        rng: states of torch's random generators, uint8, by device type.
        position: where the loader continues, beside the step.
    """

    step: int = 0
    taken: int = 0
    unlogged: Sequence[Step] = ()
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)
    scaler: Mapping[str, Any] = field(default_factory=dict)
    rng: Mapping[str, Tensor] = field(default_factory=dict)
    position: Position = field(default_factory=dict)
