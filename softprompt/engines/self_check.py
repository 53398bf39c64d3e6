"""The check of the packed engine before the first step: on a few rows of the run, its losses and its gradient must
agree with those of the padded engine. Both engines are also timed; `--engine auto` uses the result.

The result is cached; `result_key` lists what it depends on. It holds for rows up to the longest one that was checked,
because a base may treat longer rows differently (sliding windows, chunks).
"""

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.data.examples import IGNORE, Example, Examples, count_targets
from softprompt.engines.base import Engine
from softprompt.engines.microbatch_engine import MicrobatchEngine
from softprompt.prompt.soft_prompt import PromptEmbedding
from softprompt.utils.atomic_io import cache_dir, write_files
from softprompt.utils.errors import TrainingError
from softprompt.utils.out_of_memory import is_out_of_memory

# The largest differences that count as rounding: of a row's loss per token (relative if that loss is above 1), and of
# the gradient, relative to its norm. If rounding changes a base's gradient more, the tolerance is larger: see `noise`
# in `CheckResult`.
LOSS_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}
GRADIENT_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
CHECKED_ROWS, NOISE_FACTOR = 4, 2.0
CHECKED_PACKAGES = ("data", "engines", "generation", "models", "prompt", "utils")
FEW_ROWS = 8  # timed first; all rows of a step are timed if that takes at most about a second
MAX_ROUNDS = 30  # of alternating measurements
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
        failure: Why the packed engine cannot run this base; None if it can.
    """

    rows: int
    longest: int
    loss_error: float = math.inf
    gradient_error: float = math.inf
    noise: float = 0.0
    speed: float | None = None
    failure: str | None = None

    def is_right(self, dtype: torch.dtype) -> bool:
        """Whether rounding in the compute dtype `dtype` explains the differences."""
        most = max(GRADIENT_TOLERANCE[dtype], NOISE_FACTOR * self.noise)
        return self.loss_error <= LOSS_TOLERANCE[dtype] and self.gradient_error <= most

    def __str__(self) -> str:
        if self.failure:
            return f"it cannot run this base ({self.failure})"
        off = f"gradient off by {self.gradient_error:.0e}, a token's loss by {self.loss_error:.0e}"
        return f"checked against the padded one on {self.rows} rows, {off}"


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


def compare(packed: Engine, padded: MicrobatchEngine[Any], prompt: Tensor, rows: Sequence[Example]) -> CheckResult:
    """Compare losses and gradients of both engines. An error of the packed engine becomes `CheckResult.failure`.

    Args:
        prompt: [P, H].
        rows: Rows with at least one target each.

    Raises:
        TrainingError: One of the engines runs out of memory with a single row.
    """
    longest = max(len(row.input_ids) for row in rows)
    expected_losses, expected = _losses_and_gradient(padded, prompt, rows)
    try:
        losses, gradient = _losses_and_gradient(packed, prompt, rows)
    except Exception as error:
        return CheckResult(len(rows), longest, failure=_reason(error))
    noise = _relative(_gradient(padded, _rounded(prompt, padded.compute_dtype), rows), expected)
    noise = noise if math.isfinite(noise) else 0.0
    return CheckResult(
        len(rows), longest, _largest_error(losses, expected_losses), _relative(gradient, expected), noise
    )


def compare_losses(packed: Engine, padded: Engine, prompt: Tensor | None, rows: Sequence[Example]) -> CheckResult:
    """Compare only the losses of both engines, for inference; the result's `gradient_error` is 0. See `compare`.

    Args:
        prompt: [P, H]; None is the bare base.
    """
    longest = max(len(row.input_ids) for row in rows)
    expected = _losses_per_target(padded, prompt, rows)
    try:
        losses = _losses_per_target(packed, prompt, rows)
    except Exception as error:
        return CheckResult(len(rows), longest, failure=_reason(error))
    return CheckResult(len(rows), longest, _largest_error(losses, expected), 0.0)


def measure_speed(packed: Engine, padded: Engine, prompt: Tensor, window: Sequence[Example]) -> float:
    """Return the time that the padded engine takes for the gradient of a window, divided by that of the packed engine.

    Both are first timed once on up to `FEW_ROWS` rows. If the whole window would take both engines more than a second
    together, the ratio of these times is returned. Otherwise both are timed alternately on the window, for about a
    tenth of a second but at least three times, and the ratio of their shortest times is returned: other processes can
    only make a measurement longer.
    """
    few = window[:: max(1, len(window) // FEW_ROWS)][:FEW_ROWS]
    once = [_seconds(engine, prompt, few) for engine in (padded, packed)]
    expected = sum(once) * len(window) / len(few)
    if expected > 1:
        return once[0] / once[1]
    rounds = min(MAX_ROUNDS, max(3, round(0.1 / expected)))
    times = [[_seconds(engine, prompt, window) for engine in (padded, packed)] for _ in range(rounds)]
    slow, fast = map(min, zip(*times, strict=True))
    return slow / fast


def cached_result(key: str, longest: int) -> CheckResult | None:
    """Return the cached result for `key` if it holds for rows of `longest` tokens."""
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        result = CheckResult(**json.loads((cache_dir("engines") / key).read_text(encoding="ascii")))
        numbers = result._replace(speed=result.speed or 0.0)[:-1]
        if all(isinstance(number, int | float) for number in numbers) and result.longest >= longest:
            return result
    return None


def cache_result(key: str, result: CheckResult) -> None:
    """Cache the result of a check that the packed engine passed. If the result cannot be written, it is not cached.

    Do not cache a failed check: the packed engine may be right for shorter rows, and an error may not occur again.
    """
    folder = cache_dir("engines")
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_files(folder, {key: json.dumps(result._asdict()).encode()})


def result_key(base: PreTrainedModel, device: torch.device, dtype: torch.dtype, P: int, *settings: Any) -> str:
    """Return the key under which a result is cached: a hash of the base's configuration and class, the GPU or the
    number of CPU threads, the dtype, P, the versions of torch, transformers and softprompt, the code and `settings`."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {torch.get_num_threads()}"
    versions = torch.__version__, transformers.__version__, version("softprompt"), _code_hash()
    about = [base.config.to_json_string(), type(base).__name__, card, str(dtype), P, versions, settings]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


@cache
def _code_hash() -> str:
    """Return a hash of the modules that compute what is checked. The version alone does not change with them."""
    package = Path(__file__).parents[1]
    files = sorted(path for name in CHECKED_PACKAGES for path in (package / name).glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _losses_and_gradient(engine: Engine, prompt: Tensor, rows: Sequence[Example]) -> tuple[list[float], Tensor]:
    """Return each row's loss per target, and the gradient [P, H] of the mean loss over all targets."""
    return _losses_per_target(engine, prompt.to(engine.device), rows), _gradient(engine, prompt, rows)


def _gradient(engine: Engine, prompt: Tensor, rows: Sequence[Example]) -> Tensor:
    trial = PromptEmbedding(prompt).to(engine.device)
    engine.accumulate(trial, rows, 1 / sum(map(count_targets, rows)))
    assert trial.weight.grad is not None
    return trial.weight.grad


def _losses_per_target(engine: Engine, prompt: Tensor | None, rows: Sequence[Example]) -> list[float]:
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


def _reason(error: Exception) -> str:
    """Return the message of an error of the packed engine, which may be any exception, since a model may not expect to
    be called in this way. If memory ran out, raise the error again."""
    if isinstance(error, TrainingError) or (isinstance(error, RuntimeError) and is_out_of_memory(error)):
        raise error
    return " ".join(str(error).split())[:200] or type(error).__name__


def _relative(a: Tensor, b: Tensor) -> float:
    """Return ‖a - b‖ / ‖b‖ (‖a‖ if b is zero), or infinity if that is not finite."""
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
