"""Requests to a generator: the token ids of a text, the prompt before it, generation settings and a seed."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from softprompt.config.infer_config import generation_faults
from softprompt.config.schema import AUTO
from softprompt.config.unknown_names import advice
from softprompt.utils.errors import ConfigError

OnToken = Callable[[int, int], None]  # (index of the request, token id), called for each token of an answer
LIST_SETTINGS = {"suppress_tokens", "stop_strings", "eos_token_id"}  # may be given as a single value


@dataclass(frozen=True)
class GenerationSettings:
    """Settings of one answer, named as in transformers' GenerationConfig. The defaults are those of the article that
    README.md names.

    Attributes:
        max_length: Maximum number of tokens of text and answer together, for each row of a batch by itself. As in PEFT,
            virtual tokens do not count.
        max_new_tokens: Maximum number of tokens of the answer; takes precedence over `max_length`.
        stop_strings: Strings that end an answer; the answer includes the string.
        eos_token_id: Tokens that end an answer, instead of the tokenizer's eos_token.
        num_return_sequences: Number of samples for each question.
        num_beams: Number of beams. If it is above 1, transformers' beam search generates the answer.
    """

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

    def of_tokens(self) -> "GenerationSettings":
        """Return a copy in which all settings that do not affect the choice of a token have their defaults. Requests
        with equal copies are sampled together."""
        ends = ("max_length", "max_new_tokens", "stop_strings", "eos_token_id", "num_return_sequences")
        return replace(self, **{f.name: f.default for f in fields(self) if f.name in ends})

    def new_token_budget(self, text_tokens: int) -> int:
        """Return the maximum number of tokens of an answer to a text of `text_tokens` tokens.

        Raises:
            ConfigError: `max_new_tokens` is None, and the text alone reaches `max_length`.
        """
        budget = self.max_new_tokens or self.max_length - text_tokens
        if budget < 1:
            raise ConfigError(
                f"--max_length {self.max_length} leaves no room for an answer to a prompt of {text_tokens} tokens; "
                "raise it, or give --max_new_tokens"
            )
        return budget


@dataclass(frozen=True)
class StreamSettings(GenerationSettings):
    """Settings of one call of `SoftPromptModel.stream`.

    Attributes:
        seed: Seed of sampling; None draws one.
        batch_size: Number of answers that are generated at a time.
    """

    seed: int | None = None
    batch_size: int = 8


def merge_settings(saved: Mapping[str, Any], given: Mapping[str, Any]) -> GenerationSettings:
    """Merge generation settings: `given` overrides `saved` (from the adapter's folder), which overrides the defaults.
    Values of `given` that are None or "auto" are ignored.

    Raises:
        ConfigError: A setting is unknown or has an invalid value.
    """
    merged = {**saved, **{name: value for name, value in given.items() if value not in (None, AUTO)}}
    if given.get("max_length") is not None and given.get("max_new_tokens") is None:
        merged.pop("max_new_tokens", None)  # otherwise a saved max_new_tokens would override the max_length given now
    known = [f.name for f in fields(GenerationSettings)]
    if unknown := [name for name in merged if name not in known]:
        messages = "; ".join(f"unknown generation setting {name!r}{advice(name, known)}" for name in unknown)
        raise ConfigError(f"{messages}; the settings are {', '.join(known)}")
    if faults := generation_faults(merged):
        raise ConfigError("; ".join(faults))
    lists = {n: tuple(v) if isinstance(v, list | tuple) else (v,) for n, v in merged.items() if n in LIST_SETTINGS}
    return GenerationSettings(**{**merged, **lists})


@dataclass(frozen=True, eq=False)
class Request:
    """A request for one answer to one text.

    Attributes:
        input_ids: The T ≥ 1 token ids of the text, without virtual tokens.
        prompt: Virtual tokens [P, H] fp32 before the text; None for the base without a prompt.
        seed: Seed of this answer's random numbers.
        top_logprobs: Number of alternatives whose log-probabilities are recorded with those of the answer's tokens;
            None if nothing is recorded.
    """

    input_ids: Sequence[int]
    settings: GenerationSettings
    prompt: Tensor | None = None
    seed: int = 0
    top_logprobs: int | None = None

    def new_token_budget(self, max_positions: int | None = None) -> int:
        """Return the maximum number of tokens of the answer.

        Args:
            max_positions: Maximum number of positions of the base; None if it has no limit.

        Raises:
            ConfigError: The settings leave no room (see `GenerationSettings.new_token_budget`), or prompt and text take
                all positions of the base.
        """
        P, T = 0 if self.prompt is None else len(self.prompt), len(self.input_ids)
        budget = self.settings.new_token_budget(T)
        if max_positions is None:
            return budget
        if max_positions <= P + T:
            raise ConfigError(
                f"{P} virtual tokens and a prompt of {T} tokens leave no room for an answer within the "
                f"{max_positions:,} positions of this base; shorten the prompt"
            )
        return min(budget, max_positions - P - T)


def sample_seed(seed: int, question: int, sample: int = 0) -> int:
    """Derive the seed of one answer from the user's seed and the numbers (from 0) of the question and the sample.

    It is the 8-byte BLAKE2b digest, read as a big-endian integer, of the text "seed question sample" in decimal digits.
    So it does not depend on the other questions, their order in a batch or the batch size.
    """
    return int.from_bytes(hashlib.blake2b(f"{seed} {question} {sample}".encode(), digest_size=8).digest(), "big")
