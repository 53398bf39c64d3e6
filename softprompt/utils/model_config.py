"""Sizes in a transformers configuration."""

from typing import Any


def text_config(config: Any) -> Any:
    """Return the configuration of the language model: for a multimodal model, that of its text decoder."""
    return config.get_text_config(decoder=True)


def layers_and_heads(config: Any) -> tuple[int, int]:
    """Return the numbers of layers and attention heads.

    A number is 1 if the base has none (Mamba, RWKV) or a different one in each layer: PEFT's configuration needs an
    integer, but prompt tuning does not use it.
    """
    layers, heads = peft_sizes(config).values()
    return layers or 1, heads or 1


def peft_sizes(config: Any) -> dict[str, int | None]:
    """Return the numbers of layers and attention heads under PEFT's names; None if the configuration has no single
    integer."""
    text = text_config(config)
    return {
        "num_layers": _positive_int(text, "num_hidden_layers"),
        "num_attention_heads": _positive_int(text, "num_attention_heads"),
    }


def _positive_int(config: Any, name: str) -> int | None:
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # raised by transformers if the layers differ
        return None
    return value if type(value) is int and value > 0 else None
