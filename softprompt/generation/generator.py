"""The generator interface, the choice of the generator, and generation on several ranks."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from transformers import PreTrainedModel

from softprompt.distributed.process_group import World
from softprompt.distributed.row_assignment import assign_rows, select
from softprompt.engines.base import LossEngine
from softprompt.engines.bloom_schedule import BloomSchedule
from softprompt.engines.microbatch_engine import MicrobatchEngine
from softprompt.generation.bloom_step import BloomStepModel
from softprompt.generation.continuous_batching import ContinuousBatchingGenerator
from softprompt.generation.decoder_generator import DecoderGenerator
from softprompt.generation.decoding_check import check_decoding
from softprompt.generation.hf_generate import TransformersGenerator
from softprompt.generation.requests import OnToken, Request
from softprompt.models.bloom_weights import BloomWeights, has_readable_blocks, resident_weights
from softprompt.models.capabilities import why_not_generate
from softprompt.utils.errors import ConfigError, ModelError


class Generator(Protocol):
    """Answers requests in batches.

    An answer does not depend on the other requests in its batch, except for rounding: the batch may change the order of
    floating-point sums.
    """

    def generate(
        self, requests: Sequence[Request], batch_size: int = 8, on_token: OnToken | None = None
    ) -> Iterator[tuple[int, list[int]]]:
        """Answer the requests, at most `batch_size` at a time.

        The call checks all requests. The answers are computed while the iterator is consumed.

        Args:
            on_token: Called for each token of an answer with the index of its request and the token id.

        Returns:
            An iterator over (index of the request, token ids of its answer without the end token), in the order in
            which the answers are finished.

        Raises:
            ConfigError: A text leaves no room for an answer.
            TrainingError: A single request does not fit in memory. The iterator raises this.
        """
        ...


def make_generator(
    engine: LossEngine, base: PreTrainedModel, tokenizer: Any, kind: str | None = None
) -> Generator | None:
    """Return the generator for an engine and its base; None if the base cannot generate with a soft prompt
    (`capabilities.why_not_generate` returns the reason).

    With BLOOM and a packed engine, it is continuous batching with the engine's weights. Otherwise, unless `kind` is
    "padded", it is continuous batching if the base passes `decoding_check`; on CUDA, BLOOM must pass it, too. In all
    other cases it is transformers' `generate`.

    Args:
        kind: The value of `--engine`; None means the kind of `engine`, as in training.

    Raises:
        ConfigError: `kind` is "packed", but the base fails `decoding_check`.
    """
    schedule = engine.schedule if isinstance(engine, MicrobatchEngine) else None
    weights = schedule.weights if isinstance(schedule, BloomSchedule) else None
    if weights is not None or (kind or (schedule and schedule.kind)) != "padded":
        try:
            if has_readable_blocks(base):
                return _bloom_generator(weights, base, tokenizer, engine)
            return DecoderGenerator(base, tokenizer, engine.compute_dtype, only=kind == "packed")
        except ModelError as error:
            if kind == "packed":
                raise ConfigError(f"--engine packed: {error}; give --engine auto") from None
    if why_not_generate(base):
        return None
    return TransformersGenerator(base, tokenizer, engine.compute_dtype)


def _bloom_generator(
    weights: BloomWeights | None, base: PreTrainedModel, tokenizer: Any, engine: LossEngine
) -> ContinuousBatchingGenerator:
    """Return continuous batching for BLOOM. On CUDA it is checked, if `base` holds all of its weights.

    Args:
        weights: The weights of the packed engine, if there is one.

    Raises:
        ModelError: The logits differ.
    """
    model = BloomStepModel(weights or resident_weights(base, engine.compute_dtype))
    if engine.device.type != "cpu" and not any(parameter.is_meta for parameter in base.parameters()):
        check_decoding(model, base, engine.compute_dtype)
    return ContinuousBatchingGenerator(model, tokenizer)


class DataParallelGenerator:
    """A `Generator` that distributes requests over the ranks of a run. Each rank answers its share. When all ranks have
    finished, every rank yields all answers, in the order of the requests.

    Args:
        join: Called when this rank has answered its share, before the ranks exchange answers; see `DataParallelEngine`.
    """

    def __init__(self, generator: Generator, world: World, join: Callable[[], None] = lambda: None):
        self.generator, self.world, self.join = generator, world, join

    def __str__(self) -> str:
        return str(self.generator)

    def generate(
        self, requests: Sequence[Request], batch_size: int = 8, on_token: OnToken | None = None
    ) -> Iterator[tuple[int, list[int]]]:
        """See `Generator.generate`. The call checks only the requests of this rank."""
        my_share = assign_rows([len(request.input_ids) for request in requests], self.world.size)[self.world.rank]
        answers = self.generator.generate(select(requests, my_share), batch_size, on_token)
        return self._exchanged((my_share[index], answer) for index, answer in answers)

    def _exchanged(self, answers: Iterator[tuple[int, list[int]]]) -> Iterator[tuple[int, list[int]]]:
        """Compute the answers of this rank, and yield those of all ranks."""
        mine = list(answers)
        self.join()
        yield from sorted((index, answer) for share in self.world.all_gather(mine) for index, answer in share)


def in_request_order(answers: Iterator[tuple[int, list[int]]]) -> Iterator[list[int]]:
    """Yield the answers of `Generator.generate` in the order of their requests, each as soon as it and all earlier ones
    are finished."""
    finished: dict[int, list[int]] = {}
    next_index = 0
    for index, answer in answers:
        finished[index] = answer
        while next_index in finished:
            yield finished.pop(next_index)
            next_index += 1
