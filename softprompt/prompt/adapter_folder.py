"""The folder of a learned prompt: PEFT's two files, this project's settings, and a model card."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from softprompt.config.infer_args import GENERATION_DEFAULTS
from softprompt.config.loader import TrainConfig
from softprompt.prompt.adapter_io import Adapter, adapter_files, peft_config
from softprompt.prompt.file_names import CARD_FILE
from softprompt.utils.redact import redacted


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


PLACES = ("model_name_or_path", "dataset", "eval_dataset", "init_adapter", "output_dir", "offload_folder")


def model_card(adapter: Adapter, arguments: Mapping[str, Any], metrics: Mapping[str, Any]) -> bytes:
    """`arguments` and `metrics` are shown as tables; arguments at None are left out."""
    base = _public(adapter.base_model_name_or_path or "the base")
    of_package = base == "mini"  # a name that transformers does not know
    named = "base_path('mini')" if of_package else repr(base)
    arguments = {name: _public(value) if name in PLACES else value for name, value in arguments.items()}
    lines = [
        *_front(adapter.base_model_name_or_path or "", "peft", ["prompt-tuning"]),
        f"# A soft prompt for {base}",
        "",
        f"{adapter.prompt.shape[0]} virtual tokens of size {adapter.prompt.shape[1]}, learned with softprompt; "
        "the base is unchanged. The files are PEFT's.",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        *(["from softprompt.prompt.initial import base_path"] if of_package else []),
        "",
        f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({named}), 'THIS_FOLDER')",
        "```",
        "",
        "Prompts are written in the template that it was trained with (`softprompt.json`):",
        f"`{json.dumps(adapter.settings.get('template', 'default'), ensure_ascii=False)}`.",
        "",
        *_table("Metric", metrics),
        *_table("Argument", arguments),
    ]
    return redacted("\n".join(lines)).encode()


def _front(base: str, library: str, tags: Sequence[str]) -> list[str]:
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not os.path.isdir(base)
    front = {"base_model": base} if on_hub else {}  # the hub takes no card that names a folder of someone's disk
    front |= {"library_name": library, "pipeline_tag": "text-generation", "tags": tags}
    return ["---", *(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in front.items()), "---", ""]


def _public(place: Any) -> Any:
    """A card may be published: of a folder or file on this machine it has the name alone. A hub id stays."""
    if not isinstance(place, str) or not (os.path.exists(place) or os.path.isabs(place) or place[:1] in "~."):
        return place
    return os.path.basename(os.path.abspath(os.path.expanduser(place)))


def _table(head: str, values: Mapping[str, Any]) -> list[str]:
    shown = {name: value for name, value in values.items() if value is not None}
    if not shown:
        return []
    rows = [f"| {name} | {_cell(value)} |" for name, value in shown.items()]
    return [f"| {head} | Value |", "|---|---|", *rows, ""]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', '"').replace("|", "\\|")
