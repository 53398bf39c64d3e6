"""Sizes that a transformers configuration names, wherever it has them."""

from typing import Any


def text_config(config: Any) -> Any:
    """The part of a transformers configuration that describes the language model: itself, or what a multimodal wrapper
    holds."""
    return config.get_text_config(decoder=True)


def layers_and_heads(config: Any) -> tuple[int, int]:
    """Numbers of layers and attention heads. 1 stands where a base has none (Mamba, RWKV) or another number in each
    layer: PEFT asks for a whole number and does not use it for prompt tuning."""
    found = [_number(text_config(config), name) for name in ("num_hidden_layers", "num_attention_heads")]
    return found[0] or 1, found[1] or 1


def peft_sizes(config: Any) -> dict[str, int | None]:
    """The same under PEFT's names; None where the configuration does not say a whole number."""
    text = text_config(config)
    return {
        "num_layers": _number(text, "num_hidden_layers"),
        "num_attention_heads": _number(text, "num_attention_heads"),
    }


def _number(config: Any, name: str) -> int | None:
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # transformers' answer where every layer has another one
        return None
    return value if type(value) is int and value > 0 else None
