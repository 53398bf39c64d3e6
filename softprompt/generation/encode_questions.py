"""From a question as it is asked to token ids and settings, every fault naming the question."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from softprompt.config.infer_args import generation_faults
from softprompt.config.schema import AUTO, is_text
from softprompt.config.unknown_names import advice
from softprompt.data.dataset import Row, question
from softprompt.data.template import Template
from softprompt.data.tokenization import prompt_ids
from softprompt.generation.requests import GenerationSettings
from softprompt.utils.errors import ConfigError, DataError

Question = str | Mapping[str, Any]  # a text, or a row with the template's columns
SEVERAL = {"suppress_tokens", "stop_strings", "eos_token_id"}


def merged_settings(saved: Mapping[str, Any], given: Mapping[str, Any]) -> GenerationSettings:
    """What is given (not None, not "auto"), over what is saved beside the adapter, over the article's.

    Raises:
        ConfigError: an unknown or impossible setting.
    """
    merged = {**saved, **{name: value for name, value in given.items() if value not in (None, AUTO)}}
    if given.get("max_length") is not None and given.get("max_new_tokens") is None:
        merged.pop("max_new_tokens", None)  # a limit that is asked for beats a saved one
    known = [f.name for f in fields(GenerationSettings)]
    if unknown := [name for name in merged if name not in known]:
        told = "; ".join(f"unknown generation setting {name!r}{advice(name, known)}" for name in unknown)
        raise ConfigError(f"{told}; they are {', '.join(known)}")
    if faults := generation_faults(merged):
        raise ConfigError("; ".join(faults))
    several = {n: tuple(v) if isinstance(v, list | tuple) else (v,) for n, v in merged.items() if n in SEVERAL}
    return GenerationSettings(**{**merged, **several})


def encoded(place: str, asked: Question, template: Template, tokenizer: Any) -> tuple[Row, list[int]]:
    """The question as a checked row, and the token ids of its prompt text, at least one; `place` names the question in
    messages.

    Raises:
        DataError: no text and no row, a row without the template's columns, or one that a chat template refuses.
        ConfigError: a template that a text alone does not fill, or a question without a token.
    """
    if not isinstance(asked, Mapping) and not is_text(asked):
        raise DataError(f"{place} is no text and no row: {asked!r:.80}")
    is_row = isinstance(asked, Mapping)
    row = question(place, dict(asked), template) if is_row else warn_if_no_room(place, template.row, asked)
    try:
        text = template.render(row, tokenizer)
    except DataError as error:
        raise DataError(f"{place}: {error}") from None
    (ids,) = prompt_ids(tokenizer, [text], template)
    if not ids:
        raise ConfigError(f"{place} is empty: the template makes no token of it; write something")
    return row, ids


def warn_if_no_room(place: str, run: Callable[[Any], Any], value: Any) -> Any:
    """run(value), whose fault names the question."""
    try:
        return run(value)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None
