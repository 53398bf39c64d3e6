"""What is asked of a generator: texts as token ids, each with the prompt before it, its settings and its seed."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from softprompt.utils.errors import ConfigError


@dataclass(frozen=True)
class GenerationSettings:
    """transformers' GenerationConfig words; the defaults are the article's. `max_length` counts text and new tokens but
    not virtual ones, as in PEFT, for each row by itself; `max_new_tokens` counts new tokens alone and wins over it.
    `eos_token_id` stands in the place of the tokenizer's own. An answer that ends with one of `stop_strings` keeps it.
    With `num_beams` above 1 transformers searches."""

    max_length: int = 256
    max_new_tokens: int | None = None
    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    suppress_tokens: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    eos_token_id: tuple[int, ...] = ()
    num_return_sequences: int = 1
    num_beams: int = 1

    def new_tokens(self, text_tokens: int) -> int:
        """How many tokens an answer to a text of this many tokens may have.

        Raises:
            ConfigError: the text fills max_length by itself.
        """
        room = self.max_new_tokens or self.max_length - text_tokens
        if room < 1:
            raise ConfigError(
                f"--max_length {self.max_length} leaves no room for an answer to a prompt of {text_tokens} tokens; "
                "raise it, or give --max_new_tokens"
            )
        return room


@dataclass(frozen=True, eq=False)
class Request:
    """One answer to a text of T token ids, T ≥ 1, behind a prompt [P, H] fp32 (None: the bare base)."""

    ids: Sequence[int]
    settings: GenerationSettings
    prompt: Tensor | None = None
    seed: int = 0

    def new_tokens(self, max_positions: int | None = None) -> int:
        """How many tokens the answer may have over a base of `max_positions` (None: as many as one likes).

        Raises:
            ConfigError: as of `GenerationSettings.new_tokens`, or the text fills the base's positions by itself.
        """
        room, P = self.settings.new_tokens(len(self.ids)), 0 if self.prompt is None else len(self.prompt)
        if max_positions is None:
            return room
        if P + len(self.ids) >= max_positions:
            raise ConfigError(
                f"{P} virtual tokens and a prompt of {len(self.ids)} leave no room for an answer within the "
                f"{max_positions:,} positions of this base; shorten the prompt"
            )
        return min(room, max_positions - P - len(self.ids))


def seed_of(seed: int, number: int, sample: int = 0) -> int:
    """Seed of one answer: the first 8 bytes of BLAKE2b over "seed number sample" in decimal digits. It depends on
    nothing but the seed that was given, the question's number (from 0) and the sample's (from 0)."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {number} {sample}".encode(), digest_size=8).digest(), "big")
