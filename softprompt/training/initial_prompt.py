"""The initial prompt of a run: drawn as `--prompt_tuning_init` says, or the prompt of `--init_adapter`."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.config.loader import TrainConfig
from softprompt.prompt.adapter_io import load_adapter
from softprompt.prompt.initial import check_fits, initializer
from softprompt.prompt.soft_prompt import InputEmbeddings
from softprompt.runs.adapter_search import resolve_adapter
from softprompt.utils.errors import ConfigError


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
    folder, wanted = str(config.prompt.init_adapter), config.prompt.num_virtual_tokens
    prompt = load_adapter(resolve_adapter(folder, print)).prompt
    check_fits(folder, prompt, hidden_size, str(config.model.model_name_or_path))
    if wanted not in (None, prompt.shape[0]):
        raise ConfigError(
            f"--num_virtual_tokens {wanted}: the prompt of --init_adapter {folder} has {prompt.shape[0]}; leave "
            "--num_virtual_tokens out"
        )
    return prompt
