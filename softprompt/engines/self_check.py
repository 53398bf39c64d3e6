"""The check of the packed engine before the first step: on a few rows of the run, its losses and its gradient must
agree with those of the padded engine. Both engines are also timed; `--engine auto` uses the result.

The result is cached (see `check_cache`). It holds for rows up to the longest one that was checked, because a base may
treat longer rows differently (sliding windows, chunks).
"""

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from softprompt.data.examples import IGNORE, Example, Examples, count_targets
from softprompt.engines.base import Engine, LossEngine
from softprompt.engines.microbatch_engine import MicrobatchEngine
from softprompt.prompt.soft_prompt import PromptEmbedding
from softprompt.utils.errors import OutOfMemoryError, TrainingError
from softprompt.utils.out_of_memory import reason_or_raise

# The largest differences that count as rounding: of a row's loss per token (relative if that loss is above 1), and of
# the gradient, relative to its norm. If rounding changes a base's gradient more, the tolerance is larger: see `noise`
# in `CheckResult`.
LOSS_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}
GRADIENT_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
# The largest difference of a loss that rounding may explain, if the engines agree in fp32: in a mixture of experts, it
# may send a token to another expert.
MAX_LOSS_ERROR = 0.25
CHECKED_ROWS, NOISE_FACTOR = 4, 2.0
MAX_GRADIENT_ERROR = 0.4  # upper limit of the tolerance; a gradient that is half of the right one has an error of 0.5
FEW_ROWS = 8  # timed first; all rows of a step are timed if that takes at most about a second
MAX_ROUNDS = 30  # of alternating measurements
AFFORDABLE = 20.0  # seconds that the second measurement of a few rows may take
CLEARLY_FASTER = 1.1  # a smaller advantage of the padded engine may be chance


class CheckResult(NamedTuple):
    """The result of a comparison of the packed engine with the padded engine.

    Attributes:
        rows: Number of rows that were compared.
        longest: Number of tokens of the longest of these rows.
        loss_error: Largest difference between the two engines' loss per token of a row; relative to that loss if it is
            above 1.
        gradient_error: ‖difference of the gradients‖ / ‖gradient of the padded engine‖.
        noise: How much rounding changes the gradient: the same ratio for the padded engine's gradients of two prompts
            that differ by about the rounding error of the compute dtype (see `_rounded`).
        speed: Time of the padded engine / time of the packed engine; None if they were not timed.
        in_fp32: Whether both engines computed in fp32 because rounding to a narrower dtype changes the results much.
        failure: Why the packed engine cannot run this base; None if it can.
    """

    rows: int
    longest: int
    loss_error: float = math.inf
    gradient_error: float = math.inf
    noise: float = 0.0
    speed: float | None = None
    in_fp32: bool = False
    failure: str | None = None

    def is_right(self, dtype: torch.dtype) -> bool:
        """Whether rounding in the compute dtype `dtype` explains the differences."""
        return self.loss_error <= LOSS_TOLERANCE[dtype] and self.is_near(dtype)

    def is_near(self, dtype: torch.dtype) -> bool:
        """Whether rounding explains the difference of the gradients, and may explain that of the losses."""
        most = max(GRADIENT_TOLERANCE[dtype], min(MAX_GRADIENT_ERROR, NOISE_FACTOR * self.noise))
        return self.has_near_losses and self.gradient_error <= most

    @property
    def has_near_losses(self) -> bool:
        """Whether rounding may explain the difference of the losses."""
        return self.failure is None and self.loss_error <= MAX_LOSS_ERROR

    def __str__(self) -> str:
        if self.failure:
            return f"it cannot run this base ({self.failure})"
        off = f"gradient off by {self.gradient_error:.0e}, a token's loss by {self.loss_error:.0e}"
        why = "; compared in fp32, because this base is very sensitive to rounding" if self.in_fp32 else ""
        return f"checked against the padded one on {self.rows} rows, {off}{why}"


def rows_to_check(rows: Sequence[Example], longest: int = 0) -> list[Example]:
    """Return up to CHECKED_ROWS rows that have targets, longest first: the longest, the shortest, and some in between.

    Args:
        longest: If no row has this many tokens, the ids of the longest row are repeated to this length.
    """
    if isinstance(rows, Examples):  # there may be millions of rows, so avoid a loop over them
        lengths, targets = rows.lengths, rows.lengths - rows.first_targets
    else:
        lengths, targets = (np.array([f(row) for row in rows]) for f in (_length, count_targets))
    longest_first = np.argsort(-lengths, kind="stable")
    with_targets = longest_first[targets[longest_first] > 0]
    last, n = len(with_targets) - 1, min(CHECKED_ROWS, len(with_targets))
    chosen = [rows[int(with_targets[round(i * last / max(1, n - 1))])] for i in range(n)]
    if chosen and len(chosen[0].input_ids) < longest:
        chosen[0] = _repeated(chosen[0], longest)
    return chosen


def _length(row: Example) -> int:
    return len(row.input_ids)


def _repeated(row: Example, tokens: int) -> Example:
    """Return a row of `tokens` tokens that ends with `row` and begins with repetitions of its ids. Only the labels of
    `row` itself, at the end, are targets."""
    before = tokens - len(row.input_ids)
    ids = (row.input_ids * (before // len(row.input_ids) + 1))[:before]
    return Example([*ids, *row.input_ids], [IGNORE] * before + list(row.labels))


def compare(
    packed: Engine, padded: MicrobatchEngine[Any], prompt: Tensor, rows: Sequence[Example], in_step: bool = False
) -> CheckResult:
    """Compare losses and gradients of both engines. An error of the packed engine becomes `CheckResult.failure`.

    If the padded engine runs out of memory on the longest row and the packed one does not, only the other rows are
    compared, and of a single row the second half.

    Args:
        prompt: [P, H].
        rows: Rows with at least one target each, longest first.
        in_step: Whether the base is sharded, so that all ranks must make the same passes: then a lack of memory is an
            error.

    Raises:
        TrainingError: The padded engine has no memory for a single row; see `in_step`, too.
    """
    longest = max(len(row.input_ids) for row in rows)
    try:
        expected_losses, expected = _losses_and_gradient(padded, prompt, rows)
    except OutOfMemoryError:
        shorter = rows[1:] or _second_half(rows[0])
        if in_step or not shorter or not _runs(packed, prompt, rows[:1]):
            raise
        return compare(packed, padded, prompt, shorter)
    try:
        losses, gradient = _losses_and_gradient(packed, prompt, rows)
    except Exception as error:
        if isinstance(error, TrainingError) and (in_step or not isinstance(error, OutOfMemoryError)):
            raise
        return CheckResult(len(rows), longest, failure=reason_or_raise(error))
    noise = _relative(_gradient(padded, _rounded(prompt, padded.compute_dtype), rows), expected)
    noise = noise if math.isfinite(noise) else 0.0
    return CheckResult(
        len(rows), longest, _largest_error(losses, expected_losses), _relative(gradient, expected), noise
    )


def compare_losses(
    packed: LossEngine, padded: LossEngine, prompt: Tensor | None, rows: Sequence[Example]
) -> CheckResult:
    """Compare only the losses of both engines, for inference; the result's `gradient_error` is 0. See `compare`.

    Args:
        prompt: [P, H]; None is the bare base.
    """
    longest = max(len(row.input_ids) for row in rows)
    expected = _losses_per_target(padded, prompt, rows)
    try:
        losses = _losses_per_target(packed, prompt, rows)
    except Exception as error:
        if isinstance(error, TrainingError):
            raise
        return CheckResult(len(rows), longest, failure=reason_or_raise(error))
    return CheckResult(len(rows), longest, _largest_error(losses, expected), 0.0)


def measure_speed(packed: Engine, padded: Engine, prompt: Tensor, window: Sequence[Example]) -> float:
    """Return the time that the padded engine takes for the gradient of a window, divided by that of the packed engine.

    Both are first timed once on up to `FEW_ROWS` rows. If the whole window would take both engines at most a second
    together, they are then timed alternately on the window, for about a tenth of a second but at least three times.
    Otherwise they are timed once more on the few rows, unless that would take more than `AFFORDABLE` seconds. The
    result is the ratio of the engines' shortest times on the same rows: other processes can only make a measurement
    longer, and the first one may include the allocation of memory.
    """
    few = window[:: max(1, len(window) // FEW_ROWS)][:FEW_ROWS]
    times = [[_seconds(engine, prompt, few) for engine in (padded, packed)]]
    once = sum(times[0])
    expected = once * len(window) / len(few)
    if expected <= 1:
        rows, rounds, times = window, min(MAX_ROUNDS, max(3, round(0.1 / expected))), []
    else:
        rows, rounds = few, 1 if once <= AFFORDABLE else 0
    times += [[_seconds(engine, prompt, rows) for engine in (padded, packed)] for _ in range(rounds)]
    slow, fast = map(min, zip(*times, strict=True))
    return slow / fast


def _losses_and_gradient(engine: Engine, prompt: Tensor, rows: Sequence[Example]) -> tuple[list[float], Tensor]:
    """Return each row's loss per target, and the gradient [P, H] of the mean loss over all targets."""
    return _losses_per_target(engine, prompt.to(engine.device), rows), _gradient(engine, prompt, rows)


def _second_half(row: Example) -> list[Example]:
    """Return the second half of a row, if it has targets with a token before them."""
    half = len(row.input_ids) // 2
    rest = Example(row.input_ids[half:], row.labels[half:])
    return [rest] if half and any(label != IGNORE for label in rest.labels[1:]) else []


def _runs(engine: Engine, prompt: Tensor, rows: Sequence[Example]) -> bool:
    """Whether an engine can compute the gradient of rows."""
    try:
        _gradient(engine, prompt, rows)
    except Exception:  # see `compare`
        return False
    return True


def _gradient(engine: Engine, prompt: Tensor, rows: Sequence[Example]) -> Tensor:
    trial = PromptEmbedding(prompt).to(engine.device)
    engine.accumulate(trial, rows, 1 / sum(map(count_targets, rows)))
    assert trial.weight.grad is not None
    return trial.weight.grad


def _losses_per_target(engine: LossEngine, prompt: Tensor | None, rows: Sequence[Example]) -> list[float]:
    losses = engine.row_losses(prompt, rows)
    return [loss / count_targets(row) for loss, row in zip(losses, rows, strict=True)]


def _rounded(prompt: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a prompt with random errors of the size of rounding: each number is changed by `dtype`'s machine epsilon
    (or that of the prompt's own dtype, if it is larger) or less, relative to the number."""
    epsilon = max(torch.finfo(dtype).eps, torch.finfo(prompt.dtype).eps)
    error = 2 * torch.rand(prompt.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
    return (prompt.cpu().double() * (1 + error * epsilon)).to(prompt)


def _largest_error(losses: Sequence[float], expected: Sequence[float]) -> float:
    """Return the largest difference of two losses per target, relative to the expected one if it is above 1."""
    return max(_difference(a, b) / max(1.0, abs(b)) for a, b in zip(losses, expected, strict=True))


def _relative(a: Tensor, b: Tensor) -> float:
    """Return ‖a - b‖ / ‖b‖ (‖a‖ if b is zero), or infinity if that is not finite."""
    a, b = a.double(), b.double()  # the squares of small gradients underflow in fp32
    size = b.norm().item()
    relative = (a - b).norm().item() / size if size else a.norm().item()
    return relative if math.isfinite(relative) else math.inf


def _difference(a: float, b: float) -> float:
    return abs(a - b) if math.isfinite(a) and math.isfinite(b) else math.inf


def _seconds(engine: Engine, prompt: Tensor, rows: Sequence[Example]) -> float:
    trial = PromptEmbedding(prompt).to(engine.device)
    _synchronize(engine.device)
    began = time.perf_counter()
    engine.accumulate(trial, rows, 1.0)
    _synchronize(engine.device)
    return time.perf_counter() - began


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
