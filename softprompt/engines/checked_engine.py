"""The engine of inference for decoders other than BLOOM: packed if its losses pass a check, else padded."""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from softprompt.data.tokenization import Example
from softprompt.engines.base import LossEngine, OnRows, nothing
from softprompt.engines.check_cache import cache_result, cached_result, result_key
from softprompt.engines.self_check import (
    CHECKED_ROWS,
    CheckResult,
    compare_losses,
    rows_to_check,
)
from softprompt.utils.errors import ConfigError


class CheckedEngine:
    """A `LossEngine` that compares losses of the packed engine with those of the padded engine before it takes the
    packed one.

    The check uses some of the rows of the call. Its result holds for all later rows that are not longer, and a check
    that passed is cached (see `self_check`). Calls with at most CHECKED_ROWS rows that no check covers yet take the
    padded engine, because the check would cost more than it saves.

    Args:
        base: The base of both engines.
        only: Whether to check every call, and to raise an error instead of taking the padded engine (`--engine
            packed`).
    """

    def __init__(self, base: PreTrainedModel, packed: LossEngine, padded: LossEngine, only: bool = False):
        self.base, self.packed, self.padded, self.only = base, packed, padded, only
        self.device, self.compute_dtype = padded.device, padded.compute_dtype
        self._results: dict[int, CheckResult] = {}  # by the number of virtual tokens

    def evaluate(self, prompt: Tensor | None, rows: Sequence[Example], on_rows: OnRows = nothing) -> tuple[Tensor, int]:
        """See `LossEngine.evaluate`.

        Raises:
            ConfigError: `only` was given, and the packed engine fails its check.
        """
        return self.choose(prompt, rows).evaluate(prompt, rows, on_rows)

    def row_losses(self, prompt: Tensor | None, rows: Sequence[Example], on_rows: OnRows = nothing) -> list[float]:
        """See `LossEngine.row_losses` and `evaluate`."""
        return self.choose(prompt, rows).row_losses(prompt, rows, on_rows)

    def choose(self, prompt: Tensor | None, rows: Sequence[Example]) -> LossEngine:
        """Return the engine for these rows; check the packed engine if needed.

        Raises:
            ConfigError: See `evaluate`.
        """
        longest = max((len(row.input_ids) for row in rows), default=0)
        P = 0 if prompt is None else len(prompt)
        result = self._results.get(P)
        if result is None or (result.longest < longest and result.is_right(self.compute_dtype)):
            key = result_key(self.base, self.device, self.compute_dtype, P, "losses")
            result = cached_result(key, longest)
            if result is None:
                examined = rows_to_check(rows)
                if not examined or (len(rows) <= CHECKED_ROWS and not self.only):
                    return self.padded
                result = compare_losses(self.packed, self.padded, prompt, examined)
                if result.is_right(self.compute_dtype):
                    cache_result(key, result)
            self._results[P] = result
        if result.is_right(self.compute_dtype):
            return self.packed
        if self.only:
            raise ConfigError(f"--engine packed: the packed engine fails its check: {result}; give --engine auto")
        return self.padded
