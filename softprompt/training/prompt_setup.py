"""Make the prompt that a training run begins or continues with, in its reparameterization."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.config.loader import TrainConfig
from softprompt.config.train_args import PromptTuningArguments
from softprompt.generation.adapters import warning_of_other_base
from softprompt.models.capabilities import RowMaxima, check_init_text, check_rows_fit, check_vocabulary
from softprompt.models.loading import base_path
from softprompt.prompt.adapter_io import load_adapter
from softprompt.prompt.initial import check_fits, initializer
from softprompt.prompt.reparameterization import MLPEncoder, ReparameterizedPrompt
from softprompt.prompt.soft_prompt import InputEmbeddings, PromptEmbedding
from softprompt.runs.adapter_search import resolve_adapter
from softprompt.training.resume import StartingPoint
from softprompt.training.setup import RunData
from softprompt.utils.errors import CheckpointError, ConfigError
from softprompt.utils.out_of_memory import is_out_of_memory
from softprompt.utils.translation import translate


def with_defaults_of_base(start: StartingPoint, base: PreTrainedModel) -> StartingPoint:
    """Return `start` with the settings whose defaults depend on the base: the peak learning rate and the width of the
    prompt's encoder. Files and messages then name the values that are used."""
    start, config = _with_encoder_width(start, base), start.config
    training = replace(config.training, learning_rate=config.learning_rate(InputEmbeddings(base).rms()))
    return replace(start, config=replace(start.config, training=training))


def encoder_width(prompt: PromptTuningArguments, base: PreTrainedModel) -> int:
    """Return the width of the prompt's encoder: `--encoder_hidden_size`, or the base's H."""
    return prompt.encoder_hidden_size or InputEmbeddings(base).shape[1]


def _with_encoder_width(start: StartingPoint, base: PreTrainedModel) -> StartingPoint:
    """Return `start` with the width of the prompt's encoder in its settings: `--encoder_hidden_size`, or its default
    for this base. Files and messages then name the width. Without a reparameterization, `start` is unchanged."""
    prompt = start.config.prompt
    if prompt.prompt_reparameterization == "none":
        return start
    width = encoder_width(prompt, base)
    return replace(start, config=replace(start.config, prompt=replace(prompt, encoder_hidden_size=width)))


def start_prompt(start: StartingPoint, tokenizer: Any, base: PreTrainedModel) -> PromptEmbedding:
    """Return the prompt [P, H] fp32 on the device of the base, from the checkpoint or with its initial values.

    Raises:
        CheckpointError: The checkpoint's encoder is not the one that the settings choose.
        ModelError: The tokenizer has tokens for which the base has no embedding.
        ConfigError, AdapterError: See `trainable_prompt`.
    """
    config = start.config
    check_vocabulary(tokenizer, base, base_path(str(config.model.model_name_or_path)))
    check_init_text(config.prompt.prompt_tuning_init_text, tokenizer, base)
    if start.checkpoint:
        saved = load_adapter(start.checkpoint).prompt
        prompt = restored_prompt(config, saved, start.state.encoder, start.checkpoint)
    else:
        prompt = trainable_prompt(config, tokenizer, base)
    return prompt.to(base.get_input_embeddings().weight.device)


def check_data_fits(config: TrainConfig, data: RunData, base: PreTrainedModel, P: int) -> None:
    """Check that the base can take the rows of a run behind P virtual tokens. Raises ConfigError if not."""
    maxima = RowMaxima.of(*(some.examples for some in (data.train, data.held_out) if some))
    check_rows_fit(base, P, config.data.max_length, maxima, streamed=data.streamed)


def trainable_prompt(config: TrainConfig, tokenizer: Any, base: PreTrainedModel) -> PromptEmbedding:
    """Return the prompt with its initial values, in the reparameterization that the settings choose. Random values are
    drawn with --seed; the initial prompt does not depend on the reparameterization.

    Raises:
        ConfigError, AdapterError: See `initial_prompt`; or the encoder does not fit in memory.
    """
    start = initial_prompt(config, tokenizer, base)
    if config.prompt.prompt_reparameterization == "none":
        return PromptEmbedding(start)
    width = encoder_width(config.prompt, base)
    try:
        return ReparameterizedPrompt(MLPEncoder(start.float().cpu(), width))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        raise ConfigError(
            f"--encoder_hidden_size {width}: the MLP does not fit in memory; give a smaller width"
        ) from None


def initial_prompt(config: TrainConfig, tokenizer: Any, base: PreTrainedModel) -> Tensor:
    """Return the initial prompt [P, H] fp32. Random values are drawn with --seed.

    Args:
        config: The settings of the run.
        tokenizer: The base's tokenizer.
        base: The base.

    Raises:
        ConfigError: See `initializer`; or --num_virtual_tokens differs from the P of --init_adapter.
        AdapterError: --init_adapter has no prompt or cannot be read, or its hidden size differs from the base's.
    """
    embeddings = InputEmbeddings(base)  # [V, H]
    torch.manual_seed(config.training.seed)
    if config.prompt.init_adapter:
        return _from_adapter(config, embeddings.shape[1])
    return initializer(config, tokenizer, len(embeddings))(embeddings)


def _from_adapter(config: TrainConfig, hidden_size: int) -> Tensor:
    """Return the prompt of --init_adapter, and print a warning if it was trained on another base. For the errors see
    `initial_prompt`."""
    folder, wanted = str(config.prompt.init_adapter), config.prompt.num_virtual_tokens
    adapter, base = load_adapter(resolve_adapter(folder, print)), str(config.model.model_name_or_path)
    prompt = adapter.prompt
    check_fits(folder, prompt, hidden_size, base)
    if warning := warning_of_other_base(folder, adapter.base_model_name_or_path, base):
        print(translate(warning))
    if wanted not in (None, prompt.shape[0]):
        raise ConfigError(
            f"--num_virtual_tokens {wanted}: the prompt of --init_adapter {folder} has {prompt.shape[0]}; leave "
            "--num_virtual_tokens out"
        )
    return prompt


def restored_prompt(
    config: TrainConfig, prompt: Tensor, encoder: Mapping[str, Tensor], checkpoint: str | Path
) -> PromptEmbedding:
    """Return the prompt of a checkpoint as it was while it was trained.

    Args:
        config: The settings of the run.
        prompt: The prompt [P, H] fp32 of the checkpoint.
        encoder: The saved values of its encoder (`PromptEmbedding.encoder_state`); empty without one.
        checkpoint: The checkpoint's folder, for the message.

    Raises:
        CheckpointError: The saved values are not those of the encoder that the settings choose.
    """
    kind = config.prompt.prompt_reparameterization
    if kind == "none":
        return PromptEmbedding(prompt)
    module = MLPEncoder(torch.zeros_like(prompt), config.prompt.encoder_hidden_size or prompt.shape[1])
    try:
        module.load_state_dict(dict(encoder))
    except RuntimeError:
        raise CheckpointError(
            f"{checkpoint}: its saved parameters are not those of --prompt_reparameterization {kind}; take another "
            "checkpoint, or start a new run from its prompt with --init_adapter"
        ) from None
    return ReparameterizedPrompt(module)
