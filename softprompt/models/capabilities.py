"""What a base can do behind a soft prompt, read from its configuration and modules; no forward pass, so a base on the
meta device can be looked at as well."""

import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from softprompt.config.train_args import DEFAULT_MAX_LENGTH
from softprompt.data.examples import Examples
from softprompt.utils.errors import ConfigError, ModelError
from softprompt.utils.model_config import text_config

# Names that transformers gives to tables of absolute positions, by the last part of a module's or buffer's name.
POSITION_TABLES = r"(wpe|pos_encoding|embed_positions|positions_embed|position_embeddings?)"
OTHER_TOWERS = r"(vision|visual|image|audio|speech)"


def max_positions(base: PreTrainedModel) -> int | None:
    """How many positions a row may have, virtual ones among them, where positions are looked up in a table (GPT-2, OPT,
    GPT-J …) or reach as far as the configuration says (MPT). None where there is no such limit: rotary positions, ALiBi
    and sinusoids that are computed as needed."""
    config = text_config(base.config)
    if config.model_type == "mpt":
        return config.max_seq_len
    return min(_table_sizes(base), default=None)


def check_takes_prompt(base: PreTrainedModel, name: str) -> None:
    """Refuse a base of a kind that cannot work behind a soft prompt.

    Raises:
        ModelError: its forward takes no `inputs_embeds`, or it looks up words by their ids in every layer, too.
    """
    kind = type(base).__name__
    if "inputs_embeds" not in inspect.signature(base.forward).parameters:
        raise ModelError(f"{name}: {kind} takes no inputs_embeds, so no soft prompt can precede its words")
    if getattr(text_config(base.config), "hidden_size_per_layer_input", 0):
        raise ModelError(
            f"{name}: {kind} looks words up by their ids in every layer (hidden_size_per_layer_input), and a virtual "
            "token has no id; take a base without per-layer inputs"
        )


def why_no_answers(base: PreTrainedModel) -> str | None:
    """Why transformers' generate cannot answer behind a prompt with this base; None where it can. It looks at the same
    signature as `GenerationMixin._prepare_model_inputs`."""
    prepare = getattr(base, "prepare_inputs_for_generation", None)
    if prepare is not None and "inputs_embeds" in inspect.signature(prepare).parameters:
        return None
    return f"the generate method of {type(base).__name__} takes no inputs_embeds, so it cannot answer behind a prompt"


def check_vocabulary(tokenizer: Any, base: PreTrainedModel, name: str) -> None:
    """Refuse a tokenizer whose words the base does not have. Tokens that were added to it are left alone (Gemma 3's
    text models have one for images, beyond the embeddings), as long as no text has one: see `check_ids`. A pad token
    beyond the embeddings becomes the end token, since pads are masked anyway.

    Raises:
        ModelError: a word or the end token has an id beyond the word embeddings.
    """
    V, added = base.get_input_embeddings().num_embeddings, tokenizer.added_tokens_decoder.keys()
    largest = max((id for id in tokenizer.get_vocab().values() if id not in added), default=0)
    largest = max(largest, tokenizer.eos_token_id)
    if largest >= V:
        raise ModelError(
            f"{name}: its tokenizer has {largest + 1:,} words, but its embeddings have {V:,} rows; take the tokenizer "
            "that belongs to the base, or resize the base's embeddings"
        )
    if tokenizer.pad_token_id >= V:
        tokenizer.pad_token = tokenizer.eos_token


def check_ids(ids: Iterable[int], base: PreTrainedModel, where: str) -> None:
    """Raises ConfigError where a text has a token that the base's word embeddings do not reach."""
    V = base.get_input_embeddings().num_embeddings
    if (largest := max(ids, default=0)) >= V:
        raise ConfigError(
            f"{where}: token id {largest:,}, which was added to the tokenizer, is beyond the {V:,} rows of the base's "
            "word embeddings; take that token out of the text, or resize the base's embeddings"
        )


def check_start(text: str | None, tokenizer: Any, base: PreTrainedModel) -> None:
    """Raises ConfigError, as of `check_ids`, for the text that a prompt starts from."""
    if text:
        check_ids(tokenizer(text)["input_ids"], base, "--prompt_tuning_init_text")


def check_positions(positions: int | None, P: int, tokens: int, where: str, way: str = "") -> None:
    """Raises ConfigError where a row of `tokens` behind P virtual tokens needs more than the base's positions. The
    `way` out is by default the largest --max_length that fits."""
    if positions is not None and P + tokens > positions:
        most = positions - P
        fits = f"give --max_length {most} or less" if most > 1 else "give a smaller --num_virtual_tokens"
        raise ConfigError(
            f"{where}: {P} virtual tokens and {tokens:,} of text need more than the {positions:,} positions of this "
            f"base; {way or fits}"
        )


class Extent(NamedTuple):
    """How far rows reach: the tokens of the longest, and the largest token id."""

    longest: int
    largest_id: int

    @classmethod
    def of(cls, *parts: Examples) -> "Extent":
        """The extent of all these examples together; there is at least one."""
        some = [part for part in parts if len(part)]
        return cls(max(int(part.lengths.max()) for part in some), max(int(part.input_ids.max()) for part in some))


def check_extent(base: PreTrainedModel, P: int, max_length: int, rows: Extent, streamed: bool = False) -> None:
    """Refuse rows that the base cannot take behind P virtual tokens. A --max_length that was chosen must fit by itself,
    as it must where more rows are `streamed` later; the default one only where a row is that long.

    Raises:
        ConfigError: too few positions, or a token without an embedding.
    """
    chosen = streamed or max_length != DEFAULT_MAX_LENGTH
    tokens = max_length if chosen else rows.longest
    check_positions(max_positions(base), P, tokens, f"--max_length {max_length}")
    check_ids([rows.largest_id], base, "a row of the dataset")


def on_meta_device(config: Any, name: str) -> PreTrainedModel:
    """A base with the modules that its configuration describes and no values.

    Raises:
        ModelError: transformers has no causal language model for it.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # ValueError, ImportError, those of the classes themselves: all mean the same here
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ModelError(f"base model {name!r} cannot be loaded: {reason}") from None


def _table_sizes(base: PreTrainedModel) -> Iterator[int]:
    """Positions in each table of the language model; the first rows of OPT's and BART's are set apart (`offset`)."""
    named = re.compile(rf"(^|\.){POSITION_TABLES}$")
    for name, module in base.named_modules():
        if isinstance(module, nn.Embedding) and named.search(name) and not re.search(OTHER_TOWERS, name):
            yield module.num_embeddings - getattr(module, "offset", 0)
    for name, buffer in base.named_buffers():
        if buffer.dim() == 2 and named.search(name) and not re.search(OTHER_TOWERS, name):
            yield len(buffer)
