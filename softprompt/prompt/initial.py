"""Initial values of a soft prompt, as `--prompt_tuning_init` or `--init_adapter` names them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.config.loader import TrainConfig
from softprompt.config.train_args import DEFAULT_NUM_VIRTUAL_TOKENS, DEFAULT_VOCAB_POPULATION
from softprompt.config.value_parsers import parse_labels
from softprompt.prompt.adapter_io import load_adapter
from softprompt.prompt.soft_prompt import (
    EmbeddedWords,
    Initialiser,
    class_label_init,
    random_init,
    sample_of_init,
    sample_vocab_init,
    token_init,
)
from softprompt.prompt.vocabulary import frequent_tokens, label_tokens
from softprompt.utils.errors import AdapterError, ConfigError


def goes_on_in(output_dir: Path, checkpoint: Path | None) -> bool:
    """Whether the run in `output_dir` is the one that `checkpoint` is of; all else that stands there is another's."""
    here = output_dir.resolve()
    return checkpoint is not None and here in (checkpoint.parent.resolve(), checkpoint.resolve().parent)


def initial_prompt(config: TrainConfig, tokenizer: Any, base: PreTrainedModel) -> Tensor:
    """The prompt's first values [P, H] fp32, seeded by --seed.

    Raises:
        ConfigError: as of `initialiser`, or --num_virtual_tokens beside --init_adapter and another than its number.
        AdapterError: --init_adapter does not hold a prompt for a base of this hidden size.
    """
    words = EmbeddedWords(base)  # [V, H]
    if config.prompt.init_adapter:
        return _from_adapter(config, words.shape[1])
    torch.manual_seed(config.training.seed)
    return initialiser(config, tokenizer, len(words))(words)


def initialiser(config: TrainConfig, tokenizer: Any, vocabulary: int) -> Initialiser:
    """The way a prompt starts; `vocabulary` is V, the rows of the word embeddings.

    Raises:
        ConfigError: a text without tokens, a class label that the tokenizer cannot express, or no words to draw from.
    """
    prompt = config.prompt
    init, wanted = prompt.prompt_tuning_init, prompt.num_virtual_tokens
    if init == "TEXT":
        return token_init(tokenizer(prompt.prompt_tuning_init_text)["input_ids"], wanted)
    length = wanted or DEFAULT_NUM_VIRTUAL_TOKENS
    if init == "RANDOM":
        return random_init(length)
    if init == "SAMPLE_VOCAB" and prompt.vocab_population is None:
        return sample_vocab_init(length)
    most = prompt.vocab_population or DEFAULT_VOCAB_POPULATION
    sampled = sample_of_init(frequent_tokens(tokenizer, most, vocabulary), length)
    if init == "SAMPLE_VOCAB":
        return sampled
    return class_label_init(label_tokens(tokenizer, parse_labels(str(prompt.class_labels))), sampled)


def check_fits(adapter_dir: str | Path, prompt: Tensor, hidden_size: int, base_name: str) -> None:
    """Raises AdapterError where a prompt [P, H] was learned for a base of another hidden size."""
    if prompt.shape[1] != hidden_size:
        raise AdapterError(
            f"adapter {adapter_dir}: its virtual tokens have size {prompt.shape[1]}, but {base_name} has hidden size "
            f"{hidden_size}; use the base that it was trained on"
        )


def _from_adapter(config: TrainConfig, hidden_size: int) -> Tensor:
    folder, wanted = str(config.prompt.init_adapter), config.prompt.num_virtual_tokens
    prompt = load_adapter(folder).prompt
    check_fits(folder, prompt, hidden_size, str(config.model.model_name_or_path))
    if wanted not in (None, prompt.shape[0]):
        raise ConfigError(f"--num_virtual_tokens {wanted}: --init_adapter {folder} has {prompt.shape[0]}; leave it out")
    return prompt
