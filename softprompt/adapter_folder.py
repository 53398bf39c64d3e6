"""The folder of a learned prompt: PEFT's two files, this project's settings, and a model card."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from softprompt.card import model_card
from softprompt.checkpoint import CARD_FILE, Adapter, adapter_files, peft_config
from softprompt.config import TrainConfig
from softprompt.infer_config import GENERATION_DEFAULTS


def adapter_folder(
    config: TrainConfig,
    base_config: Any,
    prompt: Tensor,
    ends: Sequence[int],
    optional_columns: Iterable[str],
    arguments: Mapping[str, Any],
    metrics: Mapping[str, Any],
) -> dict[str, bytes]:
    """The files by name of a learned prompt [P, H] fp32, with a card that shows `arguments` and `metrics`;
    `base_config` is the base's of transformers. `ends` are the tokens that its answers end with (`data.end_tokens`):
    they are saved where the tokenizer's own eos_token is not the only one. `optional_columns` are the template's (see
    `Template.optional`)."""
    name, settings = str(config.model.model_name_or_path), config.prompt
    peft = peft_config(name, base_config, prompt, settings.prompt_tuning_init, settings.prompt_tuning_init_text)
    generation = {**GENERATION_DEFAULTS.get(name, {}), **({"eos_token_id": list(ends)} if len(ends) > 1 else {})}
    ours = {
        "template": config.data.template or "default",
        "generation": generation,
        "max_length": config.data.max_length,
        "truncation_side": config.data.truncation_side,
        "columns": config.columns,
    }
    ours |= {"optional_columns": sorted(optional_columns)} if optional_columns else {}
    adapter = Adapter(prompt, peft, ours)
    return {**adapter_files(adapter), CARD_FILE: model_card(adapter, arguments, metrics)}
