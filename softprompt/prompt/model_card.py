"""The model card (README.md) of an adapter folder.

A card may be published with its adapter, so it contains no path of this machine. Of a local file or folder, it shows
only the last component of the path. Its code reads the path of a local base from adapter_config.json when it runs.
"""

import json
import os
import re
from collections.abc import Mapping
from typing import Any

from softprompt.prompt.adapter_io import CONFIG_FILE, Adapter
from softprompt.utils.redact import redacted

PATH_ARGUMENTS = ("model_name_or_path", "dataset", "eval_dataset", "init_adapter", "output_dir", "offload_folder")


def model_card(
    adapter: Adapter, arguments: Mapping[str, Any], metrics: Mapping[str, Any], verdict: str | None = None
) -> bytes:
    """Return the card of an adapter, in UTF-8.

    Args:
        adapter: The adapter; its base is named in the card's metadata if it is a repository of the hub.
        arguments: Training arguments, shown as a table; values of None are omitted.
        metrics: Final metrics, shown as a table.
        verdict: A sentence that says whether the prompt is of use.
    """
    base = adapter.base_model_name_or_path or ""
    arguments = {name: public_name(value) if name in PATH_ARGUMENTS else value for name, value in arguments.items()}
    lines = [
        front_matter(base, "peft"),
        f"# A soft prompt for {public_name(base) or 'a causal language model'}",
        "",
        f"{adapter.prompt.shape[0]} virtual tokens of size {adapter.prompt.shape[1]}, learned with softprompt; "
        "the base is unchanged. The files are in PEFT's format.",
        "",
        *_loading_code(base),
        "",
        "Write each input in the training template, which is `template` in `softprompt.json`:",
        f"`{json.dumps(adapter.settings.get('template', 'default'), ensure_ascii=False)}`.",
        "",
        *([verdict, ""] if verdict else []),
        *_table("Metric", metrics),
        *_table("Argument", arguments),
    ]
    return redacted("\n".join(lines)).encode()


def front_matter(base: str, library: str) -> str:
    """Return a card's YAML metadata block. The base is omitted unless it looks like a hub id, because the hub refuses a
    card whose `base_model` is a local folder."""
    from huggingface_hub import ModelCardData

    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not os.path.isdir(base)
    data = ModelCardData(
        base_model=base if on_hub else None,
        library_name=library,
        pipeline_tag="text-generation",
        tags=["prompt-tuning"],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def public_name(value: Any) -> Any:
    """Return the last component of a local path; return hub ids and anything else unchanged."""
    if not _is_local(value):
        return value
    return os.path.basename(os.path.abspath(os.path.expanduser(value)))


def _is_local(value: Any) -> bool:
    return (
        bool(value) and isinstance(value, str) and (os.path.exists(value) or os.path.isabs(value) or value[0] in "~.")
    )


def _loading_code(base: str) -> list[str]:
    """Return Markdown lines with code that loads base and adapter. Only THIS_FOLDER must be replaced in it."""
    if base == "mini":  # the embedded base, whose name transformers does not know
        first, named, note = "from softprompt.mini import BASE_DIR", "BASE_DIR", []
    elif base and not _is_local(base):
        first, named, note = "", repr(base), []
    else:
        first, named = "", "PeftConfig.from_pretrained('THIS_FOLDER').base_model_name_or_path"
        note = [
            "",
            f"The base was a local folder, whose path {CONFIG_FILE} contains. On another machine, pass the path of "
            "your copy to `AutoModelForCausalLM.from_pretrained` instead.",
        ]
    return [
        "```python",
        f"from peft import {'PeftConfig, ' if note else ''}PeftModel",
        *([first] if first else []),
        "from transformers import AutoModelForCausalLM",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({named})",
        "model = PeftModel.from_pretrained(base, 'THIS_FOLDER')",
        "```",
        *note,
    ]


def _table(head: str, values: Mapping[str, Any]) -> list[str]:
    shown = {name: value for name, value in values.items() if value is not None}
    if not shown:
        return []
    rows = [f"| {name} | {_cell(value)} |" for name, value in shown.items()]
    return [f"| {head} | Value |", "|---|---|", *rows, ""]


def _cell(value: Any) -> str:
    """Format a value as one line, with escaped column separators of Markdown."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', '"').replace("|", "\\|")
