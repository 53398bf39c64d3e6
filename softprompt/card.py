"""The model card that stands beside an adapter, in the hub's form (YAML front matter, then Markdown)."""

import json
from collections.abc import Mapping
from typing import Any

from softprompt.checkpoint import Adapter
from softprompt.redact import redacted


def model_card(adapter: Adapter, arguments: Mapping[str, Any], metrics: Mapping[str, Any]) -> bytes:
    """`arguments` and `metrics` are shown as tables; arguments at None are left out."""
    base = adapter.base_model_name_or_path or "the base"
    front = {"base_model": base, "library_name": "peft", "pipeline_tag": "text-generation", "tags": ["prompt-tuning"]}
    lines = [
        "---",
        *(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in front.items()),
        "---",
        "",
        f"# A soft prompt for {base}",
        "",
        f"{adapter.prompt.shape[0]} virtual tokens of size {adapter.prompt.shape[1]}, learned with softprompt; "
        "the base is unchanged. The files are PEFT's.",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), 'THIS_FOLDER')",
        "```",
        "",
        "Prompts are written in the template that it was trained with (`softprompt.json`):",
        f"`{json.dumps(adapter.settings.get('template', 'default'), ensure_ascii=False)}`.",
        "",
        *_table("Metric", metrics),
        *_table("Argument", arguments),
    ]
    return redacted("\n".join(lines)).encode()


def _table(head: str, values: Mapping[str, Any]) -> list[str]:
    shown = {name: value for name, value in values.items() if value is not None}
    if not shown:
        return []
    rows = [f"| {name} | {_cell(value)} |" for name, value in shown.items()]
    return [f"| {head} | Value |", "|---|---|", *rows, ""]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value, ensure_ascii=False).strip('"').replace("|", "\\|")
