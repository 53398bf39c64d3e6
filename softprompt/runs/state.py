"""What the training loop passes to its callbacks, and the state of the loop that a checkpoint holds."""

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
        number: The number of the step, counted from 1.
        epoch: Number of passes over the rows after this step, as a fraction.
        loss: Mean loss over the targets of the step. None if it is not finite, which is possible only if the GradScaler
            skipped the step.
        grad_norm: The gradient's norm before clipping; None if it is not finite.
        learning_rate: The learning rate of this step.
        tokens: Number of tokens, without padding and virtual tokens.
        seconds: Wall-clock time of the step.
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
        step: Number of optimizer steps done.
        taken: Number of those that the GradScaler did not skip; the learning rate schedule counts only these.
        unlogged: The steps since the last log record.
        optimizer: AdamW's moments, in the shape of each trained parameter, and its step counts, fp32; see
            `training.optimizer.optimizer_tensors`.
        scaler: The state of the GradScaler; empty without fp16.
        rng: States of torch's random generators, uint8, by device type.
        position: The position of the last step's window, from which the loader continues.
        encoder: The values of the prompt's encoder; empty without `--prompt_reparameterization`.
    """

    step: int = 0
    taken: int = 0
    unlogged: Sequence[Step] = ()
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)
    scaler: Mapping[str, Any] = field(default_factory=dict)
    rng: Mapping[str, Tensor] = field(default_factory=dict)
    position: Position = field(default_factory=dict)
    encoder: Mapping[str, Tensor] = field(default_factory=dict)
