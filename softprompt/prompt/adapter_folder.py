"""The files of a trained adapter: PEFT's two, this project's settings, and a model card."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from softprompt.config.infer_args import GENERATION_DEFAULTS
from softprompt.config.loader import TrainConfig
from softprompt.prompt.adapter_io import PROMPT_KEY, Adapter, json_bytes
from softprompt.prompt.file_names import CARD_FILE, CONFIG_FILE, SETTINGS_FILE, WEIGHTS_FILE
from softprompt.prompt.model_card import model_card
from softprompt.utils.model_config import layers_and_heads


def adapter_folder(
    config: TrainConfig,
    base_config: Any,
    prompt: Tensor,
    ends: Sequence[int],
    optional_columns: Iterable[str],
    arguments: Mapping[str, Any],
    metrics: Mapping[str, Any],
    verdict: str | None = None,
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
        verdict: A sentence for the model card that says whether the prompt is of use.
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
    return {**adapter_files(adapter), CARD_FILE: model_card(adapter, arguments, metrics, verdict)}


PEFT_VERSION = "0.21.2"  # the version whose format is written


def peft_config(
    base_name: str, base_config: Any, prompt: Tensor, init: str, init_text: str | None = None
) -> dict[str, Any]:
    """Return the keys and values that PEFT's PromptTuningConfig saves.

    PEFT has no CLASS_LABELS initialization. Its own reader does not check the value, but code that converts it to
    `PromptTuningInit` would fail. So SAMPLE_VOCAB is written instead; the model card and checkpoints name the labels.

    Args:
        base_name: Name or path of the base.
        base_config: The base's transformers configuration.
        prompt: The prompt [P, H], of any dtype.
        init: The value of `--prompt_tuning_init`.
        init_text: The text of a TEXT initialization.
    """
    num_layers, num_attention_heads = layers_and_heads(base_config)
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "modules_to_save": None,
        "num_attention_heads": num_attention_heads,
        "num_layers": num_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": prompt.shape[0],
        "peft_type": "PROMPT_TUNING",
        "peft_version": PEFT_VERSION,
        "prompt_tuning_init": "SAMPLE_VOCAB" if init == "CLASS_LABELS" else init,
        "prompt_tuning_init_text": init_text,
        "revision": None,
        "task_type": "CAUSAL_LM",
        "token_dim": prompt.shape[1],
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": base_name if init == "TEXT" else None,
    }


def adapter_files(adapter: Adapter) -> dict[str, bytes]:
    """Serialize an adapter.

    Returns:
        The contents of PEFT's two files, byte for byte as PEFT writes them, and of softprompt.json, by file name.
    """
    values = adapter.prompt.detach().to("cpu", torch.float32).contiguous()
    return {
        WEIGHTS_FILE: save({PROMPT_KEY: values}, metadata={"format": "pt"}),
        CONFIG_FILE: json.dumps(adapter.config, indent=2, sort_keys=True).encode(),
        SETTINGS_FILE: json_bytes(adapter.settings),
    }
