"""Which engine a run takes. Nothing else in the project needs to know."""

import math
from collections.abc import Mapping
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from transformers import PreTrainedModel

from softprompt.config.loader import TrainConfig
from softprompt.engines.base import Engine
from softprompt.engines.layer_major import LayerMajor
from softprompt.engines.memory_estimate import GIB, MOST_TOKENS, auto_tokens, total_memory
from softprompt.engines.packed import PackedEngine
from softprompt.engines.padded import PaddedEngine
from softprompt.models.bloom_weights import ResidentWeights, Weights, bloom_shape, is_bloom
from softprompt.models.fsdp import ShardedWeights, Shards
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
    blocks: Mapping[str, StoredTensor] | Shards | QuantizedBlocks | None = None,
) -> Engine:
    """The engine that `--engine` names over a loaded base, for a prompt of P tokens. Where the base's `blocks` are in
    files, quantised or shards, the packed one goes layer by layer, and only shards are for another, too.

    Raises:
        ConfigError: as of `trains_packed`.
    """
    args, device = config.training, word_embeddings(base).weight.device
    if isinstance(blocks, Mapping):
        return _layer_by_layer(config, StreamedWeights(base, blocks, dtype), 2, P)
    if isinstance(blocks, QuantizedBlocks):
        held = 2 + math.ceil(bloom_shape(base.config).L * blocks.bits / (8 * dtype.itemsize))
        return _layer_by_layer(config, QuantizedWeights(base, blocks, dtype), held, P)
    if not trains_packed(config, base.config, device):
        return PaddedEngine(base, tokenizer, args.per_device_train_batch_size, dtype, args.per_device_eval_batch_size)
    if isinstance(blocks, Shards):
        held = 2 + math.ceil(len(blocks.blocks) / blocks.world.size)
        return _layer_by_layer(config, ShardedWeights(base, blocks, dtype), held, P)
    shape, memory = bloom_shape(base.config), total_memory(device)
    tokens = args.tokens_per_microbatch or auto_tokens(shape, dtype, P, device, memory, args.gradient_checkpointing)
    return PackedEngine(ResidentWeights(base, dtype), tokens, args.gradient_checkpointing)


def trains_packed(config: TrainConfig, base_config: Any, device: torch.device) -> bool:
    """Whether a run over a base of this configuration takes the packed engine.

    Raises:
        ConfigError: as of `takes_packed`, or settings of the packed engine where it does not run.
    """
    args = config.training
    packed = takes_packed(config.model.engine, base_config, device, str(config.model.model_name_or_path))
    if not packed and (args.tokens_per_microbatch or args.gradient_checkpointing):
        raise ConfigError(
            "--tokens_per_microbatch and --gradient_checkpointing are settings of the packed engine, and this run "
            "takes the padded one; leave them out" + (", or add --engine packed" if is_bloom(base_config) else "")
        )
    return packed


def _layer_by_layer(config: TrainConfig, weights: Weights, held: int, P: int) -> PackedEngine:
    """The packed engine over weights of which about `held` blocks are in memory."""
    device, dtype, shape = weights.head.device, weights.head.dtype, weights.shape._replace(L=held)
    auto = auto_tokens(shape, dtype, P, device, total_memory(device), True)
    most_bytes, folder = int(config.model.max_activation_gib * GIB), config.model.offload_folder or gettempdir()
    schedule = LayerMajor(weights, most_bytes, Path(folder))
    tokens = config.training.tokens_per_microbatch or auto
    return PackedEngine(weights, tokens, gradient_checkpointing=True, schedule=schedule)


def engine_for_inference(
    kind: str,
    base: PreTrainedModel,
    tokenizer: Any,
    dtype: torch.dtype,
    batch_size: int = 8,
    quantised: QuantizedBlocks | None = None,
) -> Engine:
    """The engine that `--engine` names, for scores; `make_generator` makes the one for answers. Over a base whose
    blocks are `quantised` it is the packed one.

    Raises:
        ConfigError: as of `takes_packed`.
    """
    device, name = word_embeddings(base).weight.device, str(getattr(base, "name_or_path", "this base"))
    if quantised or takes_packed(kind, base.config, device, name):
        weights = QuantizedWeights(base, quantised, dtype) if quantised else ResidentWeights(base, dtype)
        return PackedEngine(weights, MOST_TOKENS[weights.head.device.type])
    return PaddedEngine(base, tokenizer, batch_size, dtype)


def takes_packed(kind: str, base_config: Any, device: torch.device, name: str) -> bool:
    """Whether `--engine` means the packed engine for a base: `auto` does for BLOOM on the CPU, and not elsewhere, as
    no GPU has run it yet.

    Raises:
        ConfigError: the packed engine asked for a base that is no BLOOM.
    """
    if kind == "packed" and not is_bloom(base_config):
        sliced = " with slow_but_exact" if base_config.model_type == "bloom" else ""
        raise ConfigError(
            f"--engine packed is for BLOOM, and {name} is of type {base_config.model_type}{sliced}; leave it out"
        )
    return kind == "packed" or (kind == "auto" and is_bloom(base_config) and device.type == "cpu")
