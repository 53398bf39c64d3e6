"""Choose the engine of a training run: the packed engine if it gives the padded one's losses and gradient on a few of
the run's own rows and is not clearly slower, else the padded engine."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.config.loader import TrainConfig
from softprompt.data.tokenization import Example
from softprompt.engines.base import Engine
from softprompt.engines.check_cache import cache_result, cached_result, result_key
from softprompt.engines.factory import Blocks, make_engine, padded_engine
from softprompt.engines.memory_estimate import fits_in_fp32
from softprompt.engines.microbatch_engine import MicrobatchEngine
from softprompt.engines.self_check import (
    CLEARLY_FASTER,
    CheckResult,
    compare,
    compare_losses,
    measure_speed,
    rows_to_check,
)
from softprompt.models.bloom_weights import is_bloom
from softprompt.models.fsdp import ShardedLayers
from softprompt.models.loading import word_embeddings
from softprompt.models.precision import in_fp32, is_half
from softprompt.models.quantization import is_quantized
from softprompt.prompt.soft_prompt import InputEmbeddings
from softprompt.utils.errors import ConfigError, ModelError
from softprompt.utils.model_config import text_config
from softprompt.utils.translation import translate


class ChosenEngine(NamedTuple):
    """An engine, and one line for the user that says how it was chosen (None if there was no check)."""

    engine: Engine
    how: str | None = None


def choose_engine(
    config: TrainConfig,
    base: PreTrainedModel,
    tokenizer: Any,
    dtype: torch.dtype,
    prompt: Tensor,
    rows: Sequence[Example],
    longest: int = 0,
    blocks: Blocks | None = None,
    agree: Callable[[Any], Any] = lambda mine: mine,
) -> ChosenEngine:
    """Choose and build the engine of a training run.

    `--engine auto` takes the packed engine if it gives the padded engine's losses and gradient (see `self_check`) and
    is not clearly slower. `--engine packed` takes it whatever its speed, after the same check. Rows on which only the
    padded engine runs out of memory are left out of the check. If several functions could compute its attention (see
    `attn_implementations`), each is checked and the fastest is taken. There is no check with `--engine padded`, with
    `--stream_base`, or without rows that have targets; see `make_engine` for the choice then. If the layers are
    sharded, all ranks check the same rows.

    Args:
        base: The loaded, frozen base.
        prompt: [P, H].
        rows: Training rows.
        longest: Tokens of the longest row that the engine may get, held-out and streamed rows included.
        blocks: See `make_engine`.
        agree: Called with this rank's result; returns the result of rank 0, which all ranks follow.

    Raises:
        ConfigError: `--engine packed`, but the packed engine fails the check; or see `attn_implementations`.
        ModelError: The base cannot be run on embeddings.
        TrainingError: See `self_check.compare`.
    """
    kind, P, args = config.model.engine, len(prompt), config.training
    names = attn_implementations(config, base, dtype, blocks)
    streamed = isinstance(blocks, Mapping)
    examined = [] if streamed or kind == "padded" else rows_to_check(rows, longest)
    if not examined:
        kernel = "sdpa" if config.model.attn_implementation == "auto" else names[0]
        return ChosenEngine(make_engine(config, base, tokenizer, dtype, P, blocks, attn_implementation=kernel))
    padded = padded_engine(base, tokenizer, dtype, args.tokens_per_microbatch, args.gradient_checkpointing, P)
    best, found = None, CheckResult(len(examined), len(examined[0].input_ids))
    for name in names:
        packed: Engine | None = None
        try:
            packed = make_engine(config, base, tokenizer, dtype, P, blocks, "packed", name)
            result = _checked(config, base, tokenizer, packed, padded, prompt, examined, rows, blocks)
        except ModelError as error:
            result = found._replace(failure=str(error))
        result = CheckResult(*agree(list(result)))
        if packed is None or not result.is_right(dtype):
            found = found if best else result
        elif best is None or (result.speed or 1.0) > (found.speed or 1.0):
            best, found = packed, result
    return _decide(kind, best, padded, found, len(examined[0].input_ids))


def attn_implementations(
    config: TrainConfig, base: PreTrainedModel, dtype: torch.dtype, blocks: Blocks | None = None
) -> list[str]:
    """Return the functions that may compute the attention of the packed engine, as values of `--attn_implementation`.

    With `auto`, there are two on CUDA in bf16 and fp16: the variable-length kernel (for a base with ALiBi or soft caps
    FlexAttention), and scaled_dot_product_attention. Elsewhere, and for a BLOOM that is run layer by layer (streamed,
    sharded or quantized), there is only scaled_dot_product_attention.

    Args:
        blocks: See `factory.make_engine`.

    Raises:
        ConfigError: The flag names a function that needs CUDA, or that does not support the base. If the name comes
            from a checkpoint of a run that began on another device, scaled_dot_product_attention is used instead, and
            a line says so.
    """
    named, device = config.model.attn_implementation, word_embeddings(base).weight.device
    bloom = is_bloom(base.config)
    by_layers = bloom and (blocks is not None or is_quantized(base))
    has_bias = bloom or getattr(text_config(base.config), "attn_logit_softcapping", None)
    if named not in ("auto", "sdpa"):
        if device.type == "cuda" and not by_layers and not (bloom and named == "varlen"):
            return [named]
        why = f"needs CUDA, and this run is on {device}" if device.type != "cuda" else "does not support this BLOOM"
        if "attn_implementation" in config.given:
            raise ConfigError(f"--attn_implementation {named} {why}; leave it out")
        print(f"--attn_implementation: {named} in the checkpoint {why}; sdpa is used instead")
    if named != "auto" or by_layers or device.type != "cuda" or not is_half(dtype):
        return ["sdpa"]
    return ["flex_attention" if has_bias else "varlen", "sdpa"]


def _decide(kind: str, packed: Engine | None, padded: Engine, result: CheckResult, longest: int) -> ChosenEngine:
    """Return the packed engine (None if it is wrong) or the padded one, given the result of the check.

    Args:
        longest: Number of tokens of the longest row that was to be checked.
    """
    if packed is None:
        if kind == "packed":
            raise ConfigError(f"--engine packed: the packed engine fails its check: {result}; give --engine auto")
        return ChosenEngine(padded, f"padded engine, because the packed one fails its check: {result}")
    if result.longest < longest:
        unchecked = (
            f"rows of more than {result.longest:,} tokens are unchecked, "
            "because the padded engine runs out of memory on them"
        )
        return ChosenEngine(packed, f"packed engine: {result}; {unchecked}")
    speed = result.speed or 1.0
    if kind == "auto" and speed * CLEARLY_FASTER < 1:
        return ChosenEngine(padded, f"padded engine, because the packed one takes {1 / speed:.1f} times as long")
    return ChosenEngine(packed, f"packed engine: {result}; {speed:.1f} times as fast")


def _checked(
    config: TrainConfig,
    base: PreTrainedModel,
    tokenizer: Any,
    packed: Engine,
    padded: MicrobatchEngine[Any],
    prompt: Tensor,
    examined: Sequence[Example],
    rows: Sequence[Example],
    blocks: Blocks | None,
) -> CheckResult:
    """Return the cached result on the packed engine. If there is none, compare and time both engines, and cache the
    result (except in a dry run).

    If rounding may explain that the engines differ at this prompt, they must be near each other in the compute dtype
    at the embeddings of a text, where rounding changes gradients little, and agree in fp32 at this prompt.
    """
    args = config.training
    window = rows[: args.per_device_train_batch_size * args.gradient_accumulation_steps]
    size = round(math.log2(sum(len(row.input_ids) for row in window)))  # which affects the ratio of the speeds
    ranks = blocks.world.size if isinstance(blocks, ShardedLayers) else 1
    kernel = packed.state_dict()["attn_implementation"]
    settings = args.gradient_checkpointing, args.tokens_per_microbatch, size, ranks, kernel
    key = result_key(base, packed.device, packed.compute_dtype, len(prompt), *settings)
    if result := cached_result(key, len(examined[0].input_ids)):
        return result
    print(translate("checking the packed engine against the padded one …"))
    result = compare(packed, padded, prompt, examined, in_step=ranks > 1)
    result = _with_bare_base(result, packed, padded, prompt, examined)
    is_right = result.is_right(packed.compute_dtype)
    if not is_right and result.has_near_losses and blocks is None and kernel == "sdpa":
        text = InputEmbeddings(base)[torch.tensor(examined[0].input_ids, device=packed.device)]
        at_text = text[torch.arange(len(prompt)) % len(text)].to(prompt)  # [P, H], a prompt like any text
        if compare(packed, padded, at_text, examined).is_near(packed.compute_dtype):
            result = _compared_in_fp32(config, base, tokenizer, packed.compute_dtype, prompt, examined) or result
    if result.is_right(packed.compute_dtype) and result.longest == len(examined[0].input_ids):
        result = result._replace(speed=measure_speed(packed, padded, prompt, window))
        if not args.dry_run:
            cache_result(key, result)
    return result


def _with_bare_base(
    result: CheckResult, packed: Engine, padded: MicrobatchEngine[Any], prompt: Tensor, examined: Sequence[Example]
) -> CheckResult:
    """Return the result of a check that also compares the losses of the bare base, which the run evaluates, too. The
    longest row has as many positions as behind the prompt, because a row with a text cut to P tokens before it has
    them (see `evaluation.distillation`). Rows on which the padded engine ran out of memory are left out."""
    rows = [row for row in examined if len(row.input_ids) <= result.longest]
    if not rows or not result.has_near_losses:
        return result
    whole = result.longest == len(examined[0].input_ids)
    bare = compare_losses(packed, padded, None, rows_to_check(rows, result.longest + whole * len(prompt)))
    return result._replace(loss_error=max(result.loss_error, bare.loss_error), failure=bare.failure)


def _compared_in_fp32(
    config: TrainConfig,
    base: PreTrainedModel,
    tokenizer: Any,
    dtype: torch.dtype,
    prompt: Tensor,
    examined: Sequence[Example],
) -> CheckResult | None:
    """Compare both engines in fp32, which shows whether rounding to `dtype` explains that they differ: some rows of
    real bases have a gradient that any rounding changes completely. Return None if it does not explain it, `dtype` is
    not narrower, or the base cannot run in fp32: it is quantized, too large for the memory, or fails."""
    if not is_half(dtype) or is_quantized(base) or not fits_in_fp32(base, word_embeddings(base).weight.device):
        return None
    args, P, wide = config.training, len(prompt), torch.float32
    try:
        with in_fp32(base):
            packed = make_engine(config, base, tokenizer, wide, P, None, "packed")
            padded = padded_engine(base, tokenizer, wide, args.tokens_per_microbatch, args.gradient_checkpointing, P)
            result = _with_bare_base(compare(packed, padded, prompt, examined), packed, padded, prompt, examined)
    except Exception:  # out of memory, or the base computes in half precision whatever its weights are
        return None
    return result._replace(in_fp32=True) if result.is_right(wide) else None
