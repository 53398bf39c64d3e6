"""Initial values of a soft prompt, as chosen by `--prompt_tuning_init`, and the size of an encoder."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from softprompt.config.loader import TrainConfig
from softprompt.config.train_args import (
    DEFAULT_NUM_VIRTUAL_TOKENS,
    DEFAULT_VOCAB_POPULATION,
)
from softprompt.config.value_parsers import parse_labels
from softprompt.prompt.soft_prompt import (
    Initializer,
    class_label_init,
    random_init,
    sample_tokens_init,
    sample_vocab_init,
    token_init,
)
from softprompt.utils.errors import AdapterError, ConfigError


def initializer(config: TrainConfig, tokenizer: Any, vocab_size: int) -> Initializer:
    """Return the initializer that the settings choose.

    Args:
        config: The settings of the run.
        tokenizer: The base's tokenizer.
        vocab_size: V, the number of rows of the word embeddings.

    Raises:
        ConfigError: The text has no tokens, the tokenizer cannot encode a class label, or the vocabulary has no words
            to draw from.
    """
    prompt = config.prompt
    init, wanted = prompt.prompt_tuning_init, prompt.num_virtual_tokens
    if init == "TEXT":
        # With a begin token, as in PEFT. In a distillation without it, because the question already begins with one.
        begins = config.distillation.text is None
        ids = tokenizer(prompt.prompt_tuning_init_text, add_special_tokens=begins)["input_ids"]
        return token_init(ids, wanted)
    length = wanted or DEFAULT_NUM_VIRTUAL_TOKENS
    if init == "RANDOM":
        return random_init(length)
    if init == "SAMPLE_VOCAB" and prompt.vocab_population is None:
        return sample_vocab_init(length)
    population = frequent_tokens(tokenizer, prompt.vocab_population or DEFAULT_VOCAB_POPULATION, vocab_size)
    sampled = sample_tokens_init(population, length)
    if init == "SAMPLE_VOCAB":
        return sampled
    return class_label_init(label_tokens(tokenizer, parse_labels(str(prompt.class_labels))), sampled)


def check_fits(adapter_dir: str | Path, prompt: Tensor, hidden_size: int, base_name: str) -> None:
    """Raise AdapterError if the prompt [P, H] of an adapter was trained for a base of another hidden size.

    Args:
        adapter_dir: The adapter's folder, for the message.
        prompt: Its prompt [P, H].
        hidden_size: H of the base.
        base_name: The base's name, for the message.
    """
    if prompt.shape[1] != hidden_size:
        raise AdapterError(
            f"adapter {adapter_dir}: its virtual tokens have size {prompt.shape[1]}, but {base_name} has hidden size "
            f"{hidden_size}; use the base that it was trained on"
        )


def frequent_tokens(tokenizer: Any, limit: int, vocab_size: int) -> list[int]:
    """Return the ids of the most frequent tokens of a vocabulary, in descending order of frequency.

    google-research/prompt-tuning takes the lowest ids, because a SentencePiece vocabulary is sorted by frequency. The
    vocabulary of a byte-level BPE such as BLOOM's is sorted, too, after the special tokens and the 256 single bytes: an
    id is the rank of a merge, and BPE training merges the most frequent pair first. So this function returns the lowest
    ids that are neither special tokens nor single bytes. It never returns rows of the word embeddings without a token
    (BLOOM pads its embeddings to 250,880 rows).

    Args:
        tokenizer: The base's tokenizer.
        limit: The largest number of ids to return.
        vocab_size: V, the number of rows of the word embeddings; only smaller ids are returned.
    """
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    tokens = {id: token for token, id in tokenizer.get_vocab().items() if id not in special and id < vocab_size}
    alphabet = set(ByteLevel.alphabet())
    ordered = [id for id in sorted(tokens) if tokens[id] not in alphabet and not re.fullmatch("<0x..>", tokens[id])]
    return ordered[:limit]


def label_tokens(tokenizer: Any, labels: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each label, without special tokens.

    Raises:
        ConfigError: A label has no tokens, or contains the unknown token.
    """
    found = [tokenizer(label, add_special_tokens=False)["input_ids"] for label in labels]
    unknown = tokenizer.unk_token_id
    bad = [label for label, ids in zip(labels, found, strict=True) if not ids or unknown in ids]
    if bad:
        named = ", ".join(map(repr, bad))
        raise ConfigError(f"--class_labels {named}: the tokenizer cannot express this; choose words in its vocabulary")
    return found
