"""What a base supports: how long its rows may be, which token ids it knows, and whether it can be trained with a soft
prompt and can generate with one. All of it is read from its configuration and modules; no forward pass runs, so a base
on the meta device can be examined, too. (`engines.padded.check_forward` runs a few tokens.)
"""

import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from softprompt.config.data_args import DEFAULT_MAX_LENGTH
from softprompt.data.examples import Examples
from softprompt.utils.errors import ConfigError, ModelError, loading_error
from softprompt.utils.model_config import text_config

# transformers' names for tables of absolute positions: the last part of a module's or buffer's name.
POSITION_TABLES = r"(wpe|pos_encoding|embed_positions|positions_embed|position_embeddings?)"
LENGTHS = ("sliding_window", "attention_chunk_size")  # settings with which long rows are computed in another way
OTHER_MODALITIES = r"(vision|visual|image|audio|speech)"


def max_positions(base: PreTrainedModel) -> int | None:
    """Return how many positions a row may have, virtual tokens included.

    There is a limit if positions are looked up in a table (GPT-2, OPT, GPT-J, …) or the configuration limits them
    (MPT). The result is None if there is no limit: with rotary positions, ALiBi, and sinusoids that are computed as
    needed.
    """
    config = text_config(base.config)
    if config.model_type == "mpt":
        return config.max_seq_len
    return min(_position_table_sizes(base), default=None)


def depends_on_length(config: Any) -> bool:
    """Whether a base may compute long rows in another way than short ones: it has layers with sliding windows, chunks
    or blocks of attention, or layers of an unknown kind."""
    text = text_config(config)
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    return kinds != {"full_attention"} or any(getattr(text, name, None) for name in LENGTHS)


def shared_rope_limit(config: Any) -> int | None:
    """Return the number of positions beyond which a row changes the rotary frequencies of all rows of its batch
    (transformers' rope types dynamic and longrope); None for other bases."""
    text = text_config(config)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    several = [each for each in rope.values() if isinstance(each, dict)] or [rope]
    limits = [
        each.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
        for each in several
        if (each.get("rope_type") or each.get("type")) in ("dynamic", "longrope")
    ]
    return min((limit or text.max_position_embeddings for limit in limits), default=None)


def check_supports_prompt(base: PreTrainedModel, name: str) -> None:
    """Check that a soft prompt can precede the text of a base of this kind.

    Raises:
        ModelError: Its forward takes no `inputs_embeds`, or every layer looks up embeddings by token id.
    """
    kind = type(base).__name__
    if "inputs_embeds" not in inspect.signature(base.forward).parameters:
        raise ModelError(
            f"{name}: {kind} takes no inputs_embeds, so no soft prompt can precede its words; take another base"
        )
    if getattr(text_config(base.config), "hidden_size_per_layer_input", 0):
        raise ModelError(
            f"{name}: {kind} looks words up by their ids in every layer (hidden_size_per_layer_input), and a virtual "
            "token has no id; take a base without per-layer inputs"
        )


def why_not_generate(base: PreTrainedModel) -> str | None:
    """Return why transformers' `generate` cannot generate with a soft prompt and this base; None if it can. The check
    is the one in `GenerationMixin._prepare_model_inputs`."""
    prepare = getattr(base, "prepare_inputs_for_generation", None)
    if prepare is not None and "inputs_embeds" in inspect.signature(prepare).parameters:
        return None
    return f"the generate method of {type(base).__name__} takes no inputs_embeds, so it cannot answer with a prompt"


def check_vocabulary(tokenizer: Any, base: PreTrainedModel, name: str) -> None:
    """Check that the tokenizer's words have embeddings in the base.

    Tokens that were added to the tokenizer may be without an embedding, such as the token for images in Gemma 3's text
    models; `check_token_ids` refuses texts that contain one. A pad token without an embedding is replaced by the
    end-of-sequence token, since padding is masked.

    Raises:
        ModelError: A word or the end-of-sequence token has an id beyond the word embeddings.
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


def check_token_ids(ids: Iterable[int], base: PreTrainedModel, where: str) -> None:
    """Check that every token of a text has an embedding; `where` names the text in the message.

    Raises:
        ConfigError: A token id is beyond the word embeddings.
    """
    V = base.get_input_embeddings().num_embeddings
    if (largest := max(ids, default=0)) >= V:
        raise ConfigError(
            f"{where}: token id {largest:,}, which was added to the tokenizer, is beyond the {V:,} rows of the base's "
            "word embeddings; take that token out of the text, or resize the base's embeddings"
        )


def check_init_text(text: str | None, tokenizer: Any, base: PreTrainedModel) -> None:
    """Check the tokens of --prompt_tuning_init_text.

    Raises:
        ConfigError: See `check_token_ids`.
    """
    if text:
        check_token_ids(tokenizer(text)["input_ids"], base, "--prompt_tuning_init_text")


def check_positions(positions: int | None, P: int, tokens: int, where: str, advice: str = "") -> None:
    """Check that `tokens` behind P virtual tokens fit into the base's positions.

    Args:
        positions: The result of `max_positions`.
        where: What has that many tokens, for the error message.
        advice: What to do, for the error message; the default names the largest --max_length that fits.

    Raises:
        ConfigError: There are too few positions.
    """
    if positions is not None and P + tokens > positions:
        longest = positions - P
        fits = f"give --max_length {longest} or less" if longest > 1 else "give a smaller --num_virtual_tokens"
        raise ConfigError(
            f"{where}: {P} virtual tokens and {tokens:,} of text need more than the {positions:,} positions of this "
            f"base; {advice or fits}"
        )


class RowMaxima(NamedTuple):
    """The number of tokens of the longest row, and the largest token id of all rows."""

    longest: int
    largest_id: int

    @classmethod
    def of(cls, *parts: Examples) -> "RowMaxima":
        """Return the maxima over all examples in `parts`, which hold at least one example."""
        some = [part for part in parts if len(part)]
        return cls(max(int(part.lengths.max()) for part in some), max(int(part.input_ids.max()) for part in some))


def check_rows_fit(base: PreTrainedModel, P: int, max_length: int, rows: RowMaxima, streamed: bool = False) -> None:
    """Check that the base can take the rows behind P virtual tokens.

    If --max_length differs from its default, or if further rows are streamed during training, `max_length` tokens must
    fit, whatever the rows' lengths. Otherwise only the longest row must fit.

    Raises:
        ConfigError: There are too few positions, or a token has no embedding.
    """
    chosen = streamed or max_length != DEFAULT_MAX_LENGTH
    tokens = max_length if chosen else rows.longest
    check_positions(max_positions(base), P, tokens, f"--max_length {max_length}")
    check_token_ids([rows.largest_id], base, "a row of the dataset")


def build_on_meta_device(config: Any, name: str) -> PreTrainedModel:
    """Build a base from its configuration on the meta device: modules and shapes without values.

    Raises:
        ModelError: Transformers cannot build a causal language model from it.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # ValueError, ImportError, or whatever the model class raises
        raise loading_error("base model", name, error) from None


def _position_table_sizes(base: PreTrainedModel) -> Iterator[int]:
    """Yield the number of positions in each position table of the language model. OPT's and BART's tables begin with
    `offset` reserved rows, which do not count."""
    named = re.compile(rf"(^|\.){POSITION_TABLES}$")
    for name, module in base.named_modules():
        if isinstance(module, nn.Embedding) and named.search(name) and not re.search(OTHER_MODALITIES, name):
            yield module.num_embeddings - getattr(module, "offset", 0)
    for name, buffer in base.named_buffers():
        if buffer.dim() == 2 and named.search(name) and not re.search(OTHER_MODALITIES, name):
            yield len(buffer)
