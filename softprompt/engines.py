"""Which engine a run takes. Nothing else in the project needs to know."""

from typing import Any

import torch
from transformers import PreTrainedModel

from softprompt.bloom import PackedEngine
from softprompt.config import TrainConfig
from softprompt.errors import ConfigError
from softprompt.memory import auto_tokens, total_memory
from softprompt.model import Engine, PaddedEngine, word_embeddings
from softprompt.weights import ResidentWeights, bloom_shape


def make_engine(config: TrainConfig, base: PreTrainedModel, tokenizer: Any, dtype: torch.dtype, P: int) -> Engine:
    """The engine that `--engine` names over a loaded base, for a prompt of P tokens. `auto` is the packed one for BLOOM
    on the CPU, the padded one elsewhere: no GPU has run the packed one yet.

    Raises:
        ConfigError: the packed engine asked for a base that is no BLOOM, or its settings where it does not run.
    """
    args, kind = config.training, config.model.engine
    device = word_embeddings(base).weight.device
    is_bloom = base.config.model_type == "bloom" and not _is_sliced(base.config)
    if kind == "packed" and not is_bloom:
        sliced = " with slow_but_exact" if base.config.model_type == "bloom" else ""
        raise ConfigError(
            f"--engine packed is for BLOOM, and {config.model.model_name_or_path} is of type "
            f"{base.config.model_type}{sliced}; leave it out"
        )
    if kind == "padded" or (kind == "auto" and not (is_bloom and device.type == "cpu")):
        if args.tokens_per_microbatch or args.gradient_checkpointing:
            raise ConfigError(
                "--tokens_per_microbatch and --gradient_checkpointing are settings of the packed engine, and this run "
                "takes the padded one; leave them out" + (", or add --engine packed" if is_bloom else "")
            )
        return PaddedEngine(base, tokenizer, args.per_device_train_batch_size, dtype, args.per_device_eval_batch_size)
    tokens = args.tokens_per_microbatch or auto_tokens(
        bloom_shape(base.config), dtype, P, device, total_memory(device), args.gradient_checkpointing
    )
    return PackedEngine(ResidentWeights(base, dtype), tokens, args.gradient_checkpointing)


def _is_sliced(config: Any) -> bool:
    """BLOOM's slow_but_exact option adds up slices of two projections, without their biases: another function."""
    return bool(getattr(config, "slow_but_exact", False)) and config.pretraining_tp > 1
