"""Build the engine of a training run or of inference. `choice` decides which one a training run takes.

Training uses the result only through the `Engine` interface, and inference through `LossEngine`. Generation also uses
its schedule.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from transformers import PreTrainedModel

from softprompt.config.loader import TrainConfig
from softprompt.engines.base import Engine, LossEngine
from softprompt.engines.bloom_schedule import MicrobatchMajor
from softprompt.engines.checked_engine import CheckedEngine
from softprompt.engines.decoder_schedule import DecoderSchedule, JointDecoderSchedule
from softprompt.engines.layer_major import LayerMajor
from softprompt.engines.memory_estimate import (
    GIB,
    MAX_TOKENS,
    MIN_TOKENS,
    auto_tokens,
    resident_bytes,
    tokens_that_fit,
    total_memory,
)
from softprompt.engines.microbatch_engine import MicrobatchEngine
from softprompt.engines.padded_schedule import PaddedSchedule
from softprompt.models.bloom_weights import (
    BloomWeights,
    DequantizedWeights,
    bloom_shape,
    has_readable_blocks,
    is_bloom,
    resident_weights,
)
from softprompt.models.fsdp import ShardedLayers, ShardedWeights
from softprompt.models.loading import word_embeddings
from softprompt.models.weight_offload import StreamedWeights
from softprompt.utils.errors import ConfigError, ModelError
from softprompt.utils.safetensors_io import StoredTensor

Blocks = Mapping[str, StoredTensor] | ShardedLayers


def make_engine(
    config: TrainConfig,
    base: PreTrainedModel,
    tokenizer: Any,
    dtype: torch.dtype,
    P: int,
    blocks: Blocks | None = None,
    kind: str | None = None,
    attn_implementation: str = "sdpa",
) -> Engine:
    """Build the engine of a training run without checking it.

    Args:
        base: The loaded, frozen base.
        P: Number of virtual tokens.
        blocks: The blocks of a BLOOM if `base` does not hold them itself (stored in files), or the layers of any base
            that are sharded among ranks. With a BLOOM, the packed engine then uses the layer-major schedule, as it does
            with quantized blocks. Blocks in files always get the packed engine.
        kind: "packed" or "padded"; None means what `takes_packed` selects for `--engine`.
        attn_implementation: What computes attention in the packed engine; the layer-major schedule ignores it.

    Raises:
        ModelError: The base cannot be run on embeddings, or the packed engine does not support it.
    """
    args, device = config.training, word_embeddings(base).weight.device
    if isinstance(blocks, Mapping):
        return _layer_by_layer(config, StreamedWeights(base, blocks, dtype), 2, P)
    kind = kind or ("packed" if takes_packed(config.model.engine, base, device) else "padded")
    recompute = args.gradient_checkpointing
    if kind == "padded":
        return padded_engine(base, tokenizer, dtype, args.tokens_per_microbatch, recompute, P)
    if isinstance(blocks, ShardedLayers) and is_bloom(base.config):
        held = 2 + math.ceil(len(blocks.layers) / blocks.world.size)
        return _layer_by_layer(config, ShardedWeights(base, blocks, dtype), held, P)
    if has_readable_blocks(base):
        weights = resident_weights(base, dtype)
        if isinstance(weights, DequantizedWeights):
            return _layer_by_layer(config, weights, 2 + weights.held_blocks, P)
        auto = auto_tokens(bloom_shape(base.config), dtype, P, device, total_memory(device), recompute)
        schedule = MicrobatchMajor(weights, recompute, attn_implementation)
        return MicrobatchEngine(schedule, args.tokens_per_microbatch or auto)
    sharded = isinstance(blocks, ShardedLayers)
    return packed_engine(base, dtype, args.tokens_per_microbatch, recompute, sharded, attn_implementation, P)


def packed_engine(
    base: PreTrainedModel,
    dtype: torch.dtype,
    tokens: int | None = None,
    gradient_checkpointing: bool = False,
    sharded: bool = False,
    attn_implementation: str = "sdpa",
    P: int = 0,
) -> Engine:
    """Build the packed engine for a decoder other than BLOOM.

    Args:
        tokens: Maximum number of tokens of a micro-batch; None computes it from the size of the memory.
        sharded: Whether the layers of `base` are sharded among ranks.
        attn_implementation: See `DecoderSchedule`.
        P: Number of virtual tokens, if `tokens` is None.

    Raises:
        ModelError: See `DecoderSchedule`.
    """
    schedule = JointDecoderSchedule if sharded else DecoderSchedule
    return _sized(schedule(base, dtype, gradient_checkpointing, attn_implementation), tokens, P)


def padded_engine(
    base: PreTrainedModel,
    tokenizer: Any,
    dtype: torch.dtype,
    tokens: int | None = None,
    gradient_checkpointing: bool = False,
    P: int = 0,
) -> MicrobatchEngine[Any]:
    """Build the padded engine; for the arguments see `packed_engine`.

    Raises:
        ModelError: See `PaddedSchedule`.
    """
    return _sized(PaddedSchedule(base, tokenizer.pad_token_id, dtype, gradient_checkpointing), tokens, P)


def _sized(schedule: DecoderSchedule | PaddedSchedule, tokens: int | None, P: int) -> MicrobatchEngine[Any]:
    """Return the engine of `schedule` with micro-batches of at most `tokens` tokens; None means as many as fit into
    memory, in rows of MIN_TOKENS tokens behind P virtual tokens."""
    if tokens is None:
        head = schedule.head.nbytes + schedule.head.working_bytes(MAX_TOKENS[schedule.device.type])
        held = resident_bytes(schedule.base) + head + schedule.prompt_bytes(P)
        token = schedule.token_bytes(P, MIN_TOKENS)
        tokens = tokens_that_fit(token, held, schedule.device, total_memory(schedule.device))
    return MicrobatchEngine(schedule, tokens)


def _layer_by_layer(config: TrainConfig, weights: BloomWeights, held: int, P: int) -> Engine:
    """Build the packed engine with the layer-major schedule.

    Args:
        held: Estimated memory of this process for blocks, as a number of blocks in the compute dtype.
        P: Number of virtual tokens.
    """
    device, dtype, shape = weights.head.device, weights.head.dtype, weights.shape._replace(L=held)
    auto = auto_tokens(shape, dtype, P, device, total_memory(device), True)
    max_bytes, folder = int(config.model.max_activation_gib * GIB), config.model.offload_folder or gettempdir()
    return MicrobatchEngine(LayerMajor(weights, max_bytes, Path(folder)), config.training.tokens_per_microbatch or auto)


def engine_for_inference(kind: str, base: PreTrainedModel, tokenizer: Any, dtype: torch.dtype) -> LossEngine:
    """Build the engine that computes losses and likelihoods in inference. `generator.make_generator` takes this engine.

    Args:
        kind: The value of `--engine`. For BLOOM, `takes_packed` decides. For another base, the packed engine is taken
            after a check (see `checked_engine`), unless the value is "padded".

    Raises:
        ModelError: The base cannot be run on embeddings.
        ConfigError: `kind` is "packed", and the packed engine does not support the base.
    """
    device = word_embeddings(base).weight.device
    tokens = MAX_TOKENS[device.type]
    if has_readable_blocks(base) and takes_packed(kind, base, device):
        return MicrobatchEngine(MicrobatchMajor(resident_weights(base, dtype)), tokens)
    padded = padded_engine(base, tokenizer, dtype, tokens)
    if kind == "padded" or is_bloom(base.config):
        return padded
    try:
        return CheckedEngine(base, packed_engine(base, dtype, tokens), padded, only=kind == "packed")
    except ModelError as error:
        if kind == "packed":
            raise ConfigError(f"--engine packed: {error}; give --engine auto") from None
        return padded


def takes_packed(kind: str, base: PreTrainedModel, device: torch.device) -> bool:
    """Whether the value `kind` of `--engine` selects the packed engine for a base that is not checked. `auto` selects
    it only for BLOOM on the CPU."""
    return kind == "packed" or (kind == "auto" and has_readable_blocks(base) and device.type == "cpu")
