"""Answers from a frozen base with a prompt before the text: transformers' own `generate`, any causal language model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.batching import collate_padded
from softprompt.data import Example
from softprompt.errors import ConfigError
from softprompt.model import autocast, prepend, word_embeddings


@dataclass(frozen=True)
class GenerationSettings:
    """transformers' GenerationConfig words; the defaults are the article's. `max_length` counts text and new tokens but
    not virtual ones, as in PEFT, for each row by itself; `max_new_tokens` counts new tokens alone and wins over it."""

    max_length: int = 256
    max_new_tokens: int | None = None
    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0

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


def generate(
    base: PreTrainedModel,
    tokenizer: Any,
    prompt: Tensor | None,
    token_ids: Sequence[Sequence[int]],
    settings: GenerationSettings,
    compute_dtype: torch.dtype,
    batch_size: int = 8,
) -> Iterator[list[int]]:
    """For each text its answer's token ids, without the end token and what follows it, in the given order; texts are
    checked at once, answers made as they are asked for.

    prompt: [P, H] fp32, or None for the bare base. Seed torch before the call for repeatable samples.

    Raises:
        ConfigError: a text that leaves no room for an answer.
    """
    rooms = [settings.new_tokens(len(ids)) for ids in token_ids]

    def answers() -> Iterator[list[int]]:
        for start in range(0, len(token_ids), batch_size):
            rows, room = token_ids[start : start + batch_size], rooms[start : start + batch_size]
            made = _generate_batch(base, tokenizer, prompt, rows, max(room), settings, compute_dtype)
            for answer, limit in zip(made, room, strict=True):
                yield _until(answer[:limit], tokenizer.eos_token_id)

    return answers()


@torch.no_grad()
def _generate_batch(
    base: PreTrainedModel,
    tokenizer: Any,
    prompt: Tensor | None,
    rows: Sequence[Sequence[int]],
    max_new_tokens: int,
    settings: GenerationSettings,
    compute_dtype: torch.dtype,
) -> list[list[int]]:
    examples = [Example(list(ids), [-100] * len(ids)) for ids in rows]
    embed = word_embeddings(base)
    # answers continue a row at its right end, so padding stands on the left whatever the tokenizer's habit
    batch = collate_padded(examples, tokenizer.pad_token_id, "left").to(embed.weight.device)
    front = embed.weight[:0] if prompt is None else prompt.to(embed.weight.device)  # [P, H]
    embeddings, mask, _ = prepend(front, embed(batch.input_ids), batch.attention_mask, batch.labels)
    sampling = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
    with autocast(embed.weight.device, compute_dtype):
        out = cast(Any, base).generate(  # returns [B, T + new]: the ids given, then the answer's
            input_ids=batch.input_ids,
            inputs_embeds=embeddings,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=settings.do_sample,
            repetition_penalty=settings.repetition_penalty,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **(sampling if settings.do_sample else {}),
        )
    return out[:, batch.input_ids.shape[1] :].tolist()


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids
