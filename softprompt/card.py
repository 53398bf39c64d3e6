"""Model cards, of an adapter and of an exported model, in the hub's form (YAML front matter, then Markdown)."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from softprompt.checkpoint import Adapter
from softprompt.redact import redacted


def model_card(adapter: Adapter, arguments: Mapping[str, Any], metrics: Mapping[str, Any]) -> bytes:
    """`arguments` and `metrics` are shown as tables; arguments at None are left out."""
    base = adapter.base_model_name_or_path or "the base"
    of_package = base == "mini"  # a name that transformers does not know
    named = "base_path('mini')" if of_package else repr(base)
    lines = [
        *_front(base, "peft", ["prompt-tuning"]),
        f"# A soft prompt for {base}",
        "",
        f"{adapter.prompt.shape[0]} virtual tokens of size {adapter.prompt.shape[1]}, learned with softprompt; "
        "the base is unchanged. The files are PEFT's.",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        *(["from softprompt.build import base_path"] if of_package else []),
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


def plain_model_card(base: str, adapter: Adapter, words: Sequence[str], constant: float | None, dtype: str) -> bytes:
    """Of a base with the prompt as `words`; `constant` is their logit, None where it is the mean of the others'."""
    template = json.dumps(adapter.settings.get("template", "default"), ensure_ascii=False)
    guard = (
        f"their logit is {constant:g} whatever the text"
        if constant is not None
        else "their logit is the mean of all others, so none of them is ever the likeliest"
    )
    lines = [
        *_front(base, "transformers", ["prompt-tuning"]),
        f"# {base} with a soft prompt",
        "",
        f"A plain transformers model, weights in {dtype}: the base, and {len(words)} new words `{words[0]}` to "
        f"`{words[-1]}` whose embeddings are the virtual tokens of a soft prompt. Written by softprompt, which it does "
        "not need.",
        "",
        "```python",
        "from transformers import pipeline",
        "",
        "ask = pipeline('text-generation', 'THIS_FOLDER')",
        "answer = ask([{'role': 'user', 'content': '…'}], return_full_text=False)[0]['generated_text']",
        "```",
        "",
        f"The chat template writes the new words, then the message in the template of the training: `{template}`. "
        "For a text of your own write all of them before it, in order:",
        "`''.join(t.content for t in tokenizer.added_tokens_decoder.values() if 'softprompt' in t.content)`.",
        "",
        f"The new words are never generated: the head is untied, {guard}, and `suppress_tokens` in "
        "generation_config.json names them. `max_length` there counts them.",
        "",
        "Tried with transformers (`generate`, `pipeline`, `transformers serve`) and llama.cpp. An engine that ignores "
        "`lm_head.weight` and ties the head to the embeddings may generate the new words; there forbid them by a bias.",
        "",
    ]
    return "\n".join(lines).encode()


def _front(base: str, library: str, tags: Sequence[str]) -> list[str]:
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not os.path.isdir(base)
    front = {"base_model": base} if on_hub else {}  # the hub takes no card that names a folder of someone's disk
    front |= {"library_name": library, "pipeline_tag": "text-generation", "tags": tags}
    return ["---", *(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in front.items()), "---", ""]


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
