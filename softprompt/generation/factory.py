"""The generator that goes with an engine."""

from typing import Any

from transformers import PreTrainedModel

from softprompt.engines.base import Engine
from softprompt.engines.bloom_schedule import BloomSchedule
from softprompt.engines.packed import PackedEngine
from softprompt.generation.continuous_batching import PackedGenerator
from softprompt.generation.hf_generate import Generator, TransformersGenerator
from softprompt.models.capabilities import why_not_generate


def generator_beside(engine: Engine, base: PreTrainedModel, tokenizer: Any) -> Generator | None:
    """The generator that goes with an engine, over the same weights; None where the base cannot answer behind a prompt
    (see `capabilities.why_not_generate`)."""
    if isinstance(engine, PackedEngine) and isinstance(engine.schedule, BloomSchedule):
        return PackedGenerator(engine.schedule.weights, tokenizer)
    if why_not_generate(base):
        return None
    return TransformersGenerator(base, tokenizer, engine.compute_dtype)
