"""The files of a trained adapter: PEFT's two, this project's settings, and a model card."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from softprompt.config.infer_args import GENERATION_DEFAULTS
from softprompt.config.loader import TrainConfig
from softprompt.prompt.adapter_io import Adapter, adapter_files, peft_config
from softprompt.prompt.file_names import CARD_FILE
from softprompt.prompt.model_card import model_card


def adapter_folder(
    config: TrainConfig,
    base_config: Any,
    prompt: Tensor,
    ends: Sequence[int],
    optional_columns: Iterable[str],
    arguments: Mapping[str, Any],
    metrics: Mapping[str, Any],
) -> dict[str, bytes]:
    """Return the files of a trained adapter, by name.

    Args:
        config: The settings of the run.
        base_config: The base's transformers configuration.
        prompt: The prompt [P, H] fp32.
        ends: Ids of the tokens that end an answer (`data.end_tokens`). They are saved as `eos_token_id` if there are
            several; a single one is the tokenizer's own eos_token.
        optional_columns: Columns that a question may leave out (`Template.optional`).
        arguments: Training arguments for the model card.
        metrics: Final metrics for the model card.
    """
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
