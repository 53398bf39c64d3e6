"""Choose and build the engine of a training run or of inference. Other packages use only the `Engine` interface."""

import math
from collections.abc import Mapping
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from transformers import PreTrainedModel

from softprompt.config.loader import TrainConfig
from softprompt.engines.base import Engine
from softprompt.engines.bloom_schedule import MicrobatchMajor
from softprompt.engines.layer_major import LayerMajor
from softprompt.engines.memory_estimate import GIB, MAX_TOKENS, auto_tokens, total_memory
from softprompt.engines.packed import PackedEngine
from softprompt.engines.padded import PaddedEngine
from softprompt.models.bloom_weights import BloomWeights, ResidentWeights, bloom_shape, is_bloom
from softprompt.models.fsdp import ShardedBlocks, ShardedWeights
from softprompt.models.loading import word_embeddings
from softprompt.models.quantization import QuantizedBlocks, QuantizedWeights
from softprompt.models.weight_offload import StreamedWeights
from softprompt.utils.errors import ConfigError
from softprompt.utils.safetensors_io import StoredTensor


def make_engine(
    config: TrainConfig,
    base: PreTrainedModel,
    tokenizer: Any,
    dtype: torch.dtype,
    P: int,
    blocks: Mapping[str, StoredTensor] | ShardedBlocks | QuantizedBlocks | None = None,
) -> Engine:
    """Build the engine of a training run.

    Args:
        base: The loaded, frozen base.
        P: Number of virtual tokens.
        blocks: The blocks if they are not in the memory of `base`: stored in files, sharded among ranks, or quantized.
            The packed engine then uses the layer-major schedule. Of these, the padded engine supports only sharded
            blocks.

    Raises:
        ConfigError: See `trains_packed`.
    """
    args, device = config.training, word_embeddings(base).weight.device
    if isinstance(blocks, Mapping):
        return _layer_by_layer(config, StreamedWeights(base, blocks, dtype), 2, P)
    if isinstance(blocks, QuantizedBlocks):
        held = 2 + math.ceil(bloom_shape(base.config).L * blocks.bits / (8 * dtype.itemsize))
        return _layer_by_layer(config, QuantizedWeights(base, blocks, dtype), held, P)
    if not trains_packed(config, base.config, device):
        return PaddedEngine(base, tokenizer, args.per_device_train_batch_size, dtype, args.per_device_eval_batch_size)
    if isinstance(blocks, ShardedBlocks):
        held = 2 + math.ceil(len(blocks.blocks) / blocks.world.size)
        return _layer_by_layer(config, ShardedWeights(base, blocks, dtype), held, P)
    shape, memory = bloom_shape(base.config), total_memory(device)
    tokens = args.tokens_per_microbatch or auto_tokens(shape, dtype, P, device, memory, args.gradient_checkpointing)
    return PackedEngine(MicrobatchMajor(ResidentWeights(base, dtype), args.gradient_checkpointing), tokens)


def trains_packed(config: TrainConfig, base_config: Any, device: torch.device) -> bool:
    """Whether a training run over a base of this configuration uses the packed engine.

    Raises:
        ConfigError: See `takes_packed`; or the run uses the padded engine and sets options of the packed one.
    """
    args = config.training
    packed = takes_packed(config.model.engine, base_config, device, str(config.model.model_name_or_path))
    if not packed and (args.tokens_per_microbatch or args.gradient_checkpointing):
        raise ConfigError(
            "--tokens_per_microbatch and --gradient_checkpointing are settings of the packed engine, and this run "
            "takes the padded one; leave them out" + (", or add --engine packed" if is_bloom(base_config) else "")
        )
    return packed


def _layer_by_layer(config: TrainConfig, weights: BloomWeights, held: int, P: int) -> PackedEngine:
    """Build the packed engine with the layer-major schedule.

    Args:
        held: About how many blocks the memory of this process holds at a time, in the compute dtype.
    """
    device, dtype, shape = weights.head.device, weights.head.dtype, weights.shape._replace(L=held)
    auto = auto_tokens(shape, dtype, P, device, total_memory(device), True)
    max_bytes, folder = int(config.model.max_activation_gib * GIB), config.model.offload_folder or gettempdir()
    return PackedEngine(LayerMajor(weights, max_bytes, Path(folder)), config.training.tokens_per_microbatch or auto)


def engine_for_inference(
    kind: str,
    base: PreTrainedModel,
    tokenizer: Any,
    dtype: torch.dtype,
    batch_size: int = 8,
    quantized: QuantizedBlocks | None = None,
) -> Engine:
    """Build the engine that computes losses and likelihoods in inference; the generator is built from it.

    Args:
        kind: The value of `--engine`. A base with quantized blocks always gets the packed engine.
        quantized: The blocks of `base`, if they are quantized.

    Raises:
        ConfigError: See `takes_packed`.
    """
    device, name = word_embeddings(base).weight.device, str(getattr(base, "name_or_path", "this base"))
    if quantized or takes_packed(kind, base.config, device, name):
        weights = QuantizedWeights(base, quantized, dtype) if quantized else ResidentWeights(base, dtype)
        return PackedEngine(MicrobatchMajor(weights), MAX_TOKENS[device.type])
    return PaddedEngine(base, tokenizer, batch_size, dtype)


def takes_packed(kind: str, base_config: Any, device: torch.device, name: str) -> bool:
    """Whether `--engine` (`kind`) selects the packed engine for a base. `auto` selects it for BLOOM on the CPU, but not
    on CUDA, where its speed has not been measured yet.

    Raises:
        ConfigError: `--engine packed` with a base that is no BLOOM.
    """
    if kind == "packed" and not is_bloom(base_config):
        sliced = " with slow_but_exact" if base_config.model_type == "bloom" else ""
        raise ConfigError(
            f"--engine packed is for BLOOM, and {name} is of type {base_config.model_type}{sliced}; leave it out"
        )
    return kind == "packed" or (kind == "auto" and is_bloom(base_config) and device.type == "cpu")
