"""The folder of a learned prompt: PEFT's two files, this project's settings, and a model card."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from softprompt.card import model_card
from softprompt.checkpoint import CARD_FILE, Adapter, adapter_files, peft_config
from softprompt.config import TrainConfig
from softprompt.infer_config import GENERATION_DEFAULTS


def adapter_folder(
    config: TrainConfig, base_config: Any, prompt: Tensor, arguments: Mapping[str, Any], metrics: Mapping[str, Any]
) -> dict[str, bytes]:
    """The files by name of a learned prompt [P, H] fp32, with a card that shows `arguments` and `metrics`;
    `base_config` is the base's of transformers."""
    name, settings = str(config.model.model_name_or_path), config.prompt
    peft = peft_config(name, base_config, prompt, settings.prompt_tuning_init, settings.prompt_tuning_init_text)
    ours = {
        "template": config.data.template or "default",
        "generation": GENERATION_DEFAULTS.get(name, {}),
        "max_length": config.data.max_length,
        "truncation_side": config.data.truncation_side,
        "columns": config.columns,
    }
    adapter = Adapter(prompt, peft, ours)
    return {**adapter_files(adapter), CARD_FILE: model_card(adapter, arguments, metrics)}
