"""Generation with a decoder: continuous batching where it passes its check, else transformers' `generate`."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from softprompt.engines.decoder_schedule import DecoderSchedule
from softprompt.generation.continuous_batching import ContinuousBatchingGenerator
from softprompt.generation.decoder_step import DecoderStepModel
from softprompt.generation.decoding_check import FIRST_LENGTH, check_decoding
from softprompt.generation.hf_generate import TransformersGenerator
from softprompt.generation.requests import Request
from softprompt.generation.running_batch import BatchGenerator, OnStateToken, RunningBatch
from softprompt.generation.sampling import RequestState
from softprompt.models.capabilities import depends_on_length, shared_rope_limit, why_not_generate
from softprompt.utils.errors import ConfigError, ModelError


class DecoderGenerator(BatchGenerator):
    """Answer requests with continuous batching over a decoder's own layers.

    Its logits are checked at once on short rows. A base that may compute long rows in another way (`depends_on_length`)
    is checked again before the first request with a longer row, on rows of that length. Where the check fails, and
    where a row would change the rotary frequencies of the others (`shared_rope_limit`), transformers' `generate`
    answers.

    Args:
        only: Whether to raise an error instead of taking transformers' `generate` (`--engine packed`).

    Raises:
        ModelError: The base does not use transformers' attention interface, or the logits differ.
    """

    def __init__(self, base: PreTrainedModel, tokenizer: Any, compute_dtype: torch.dtype, only: bool = False):
        self.base, self.tokenizer, self.compute_dtype, self.only = base, tokenizer, compute_dtype, only
        self.model = DecoderStepModel(DecoderSchedule(base, compute_dtype))
        self.continuous = ContinuousBatchingGenerator(self.model, tokenizer)
        self._faults: dict[int, str | None] = {}  # the results of checks of long rows, by their positions
        check_decoding(self.model, base, compute_dtype)

    def __str__(self) -> str:
        return str(self.continuous)

    def new_batch(self, batch_size: int) -> "DecoderBatch":
        """See `BatchGenerator.new_batch`."""
        return DecoderBatch(self, batch_size)

    def choose(self, requests: Sequence[Request]) -> BatchGenerator:
        """Return the generator that answers these requests.

        Raises:
            ConfigError: A text leaves no room for an answer; or continuous batching fails its check, and transformers'
                `generate` is excluded by `only` or does not support the base.
        """
        longest = max((self._positions(request) for request in requests), default=0)
        try:
            self._check(longest)
            return self.continuous
        except ModelError as error:
            if self.only:
                raise ConfigError(f"--engine packed: {error}; give --engine auto") from None
            if reason := why_not_generate(self.base):
                raise ConfigError(
                    f"{reason}; continuous batching does not work either: {error}; give a smaller --max_length, or "
                    "take another base"
                ) from None
            return self.transformers

    @cached_property
    def transformers(self) -> TransformersGenerator:
        """The generator of requests that continuous batching may not answer."""
        return TransformersGenerator(self.base, self.tokenizer, self.compute_dtype)

    def _positions(self, request: Request) -> int:
        """Return the most positions that a request's row may have."""
        P = 0 if request.prompt is None else len(request.prompt)
        return P + len(request.input_ids) + request.new_token_budget(self.model.max_positions)

    def _check(self, longest: int) -> None:
        """Check that continuous batching may answer rows of up to `longest` positions.

        Raises:
            ModelError: Continuous batching does not give the base's own logits for rows of `longest` positions.
        """
        limit = shared_rope_limit(self.base.config)
        if limit is not None and longest > limit:
            raise ModelError(f"rows of more than {limit} positions change the rotary frequencies of their batch")
        if longest > FIRST_LENGTH and depends_on_length(self.base.config):
            self._check_long(1 << (longest - 1).bit_length())  # a power of two, so that few lengths are checked

    def _check_long(self, positions: int) -> None:
        if positions not in self._faults:
            fault = None
            try:
                check_decoding(self.model, self.base, self.compute_dtype, positions)
            except ModelError as error:
                fault = str(error)
            self._faults[positions] = fault
        if fault := self._faults[positions]:
            raise ModelError(fault)


class DecoderBatch:
    """The `RunningBatch` of a `DecoderGenerator`: one of continuous batching and, where it is needed, one of
    transformers' `generate`, which take turns."""

    def __init__(self, generator: DecoderGenerator, batch_size: int):
        self.generator, self.batch_size = generator, batch_size
        self.batches: dict[BatchGenerator, RunningBatch] = {}

    def __bool__(self) -> bool:
        return any(self.batches.values())

    def add(self, requests: Sequence[Request]) -> list[RequestState]:
        """See `RunningBatch.add`. Requests that are added together are answered by the same generator."""
        generator = self.generator.choose(requests)
        if generator not in self.batches:
            self.batches[generator] = generator.new_batch(self.batch_size)
        return self.batches[generator].add(requests)

    def step(self, on_token: OnStateToken) -> list[RequestState]:
        """See `RunningBatch.step`."""
        return [state for batch in self.batches.values() if batch for state in batch.step(on_token)]
