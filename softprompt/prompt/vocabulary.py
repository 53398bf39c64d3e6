"""Words of a tokenizer's vocabulary that a prompt can start from: the most frequent ones, and given labels."""

import re
from collections.abc import Sequence
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from softprompt.utils.errors import ConfigError


def frequent_tokens(tokenizer: Any, most: int, vocabulary: int) -> list[int]:
    """Ids of the `most` most frequent words (all, if there are fewer), below `vocabulary`, the rows of the embeddings.

    google-research/prompt-tuning takes the lowest ids, since a SentencePiece vocabulary is sorted by frequency. That of
    BLOOM and of every byte-level BPE is, too, once its special tokens and the 256 single bytes are past: an id is the
    rank of a merge, and training merges the most frequent pair first. So these are the lowest ids that are neither
    special nor a byte. Rows of the embeddings that no word has (BLOOM's are padded to 250,880) never come in.
    """
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    words = {id: word for word, id in tokenizer.get_vocab().items() if id not in special and id < vocabulary}
    alphabet = set(ByteLevel.alphabet())
    ordered = [id for id in sorted(words) if words[id] not in alphabet and not re.fullmatch("<0x..>", words[id])]
    return ordered[:most]


def label_tokens(tokenizer: Any, labels: Sequence[str]) -> list[list[int]]:
    """The sub-words of each label, without special tokens.

    Raises:
        ConfigError: labels that have no tokens, or one that the tokenizer does not know.
    """
    found = [tokenizer(label, add_special_tokens=False)["input_ids"] for label in labels]
    unknown = tokenizer.unk_token_id
    bad = [label for label, ids in zip(labels, found, strict=True) if not ids or unknown in ids]
    if bad:
        named = ", ".join(map(repr, bad))
        raise ConfigError(f"--class_labels {named}: the tokenizer cannot express this; give labels of words it knows")
    return found
