"""Read sizes from a transformers configuration, under whatever names and at whatever level it has them."""

from typing import Any


def text_config(config: Any) -> Any:
    """Return the configuration of the language model: `config` itself, or the part of a multimodal wrapper's."""
    return config.get_text_config(decoder=True)


def layers_and_heads(config: Any) -> tuple[int, int]:
    """Return the numbers of layers and attention heads.

    A number is 1 where the base has none (Mamba, RWKV) or a different one in each layer: PEFT requires an integer in
    adapter_config.json but does not use it for prompt tuning.
    """
    found = peft_model_sizes(config)
    return found["num_layers"] or 1, found["num_attention_heads"] or 1


def peft_model_sizes(config: Any) -> dict[str, int | None]:
    """Return the same numbers under PEFT's names; None where the configuration has no single integer."""
    text = text_config(config)
    return {
        "num_layers": _positive_int(text, "num_hidden_layers"),
        "num_attention_heads": _positive_int(text, "num_attention_heads"),
    }


def _positive_int(config: Any, name: str) -> int | None:
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # transformers raises it where each layer has its own number
        return None
    return value if type(value) is int and value > 0 else None
