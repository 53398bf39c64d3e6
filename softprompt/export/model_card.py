"""The model card (README.md) of an exported model."""

import json
from collections.abc import Sequence

from softprompt.data.template import saved_template
from softprompt.prompt.adapter_io import Adapter
from softprompt.prompt.card_metadata import front_matter
from softprompt.prompt.public_names import hub_id_of_base, public_name


def plain_model_card(base: str, adapter: Adapter, words: Sequence[str], constant: float | None, dtype: str) -> bytes:
    """Return the card of a base whose vocabulary contains the prompt as new tokens, in UTF-8.

    Args:
        base: Folder or hub id of the base; of a folder, only the name is shown.
        adapter: The adapter that was exported.
        words: The new tokens, one for each virtual token.
        constant: The constant logit of the new tokens; None if it is the mean of the other logits.
        dtype: The dtype of the weights, such as "float32".
    """
    front = front_matter(hub_id_of_base(base), "transformers")
    base, template = public_name(base), json.dumps(adapter.settings.get("template", "default"), ensure_ascii=False)
    guard = (
        f"their logit is {constant:g} after any text"
        if constant is not None
        else "their logit is the mean of all others, so that none of them is ever the most likely token"
    )
    lines = [
        front,
        f"# {base} with a soft prompt",
        "",
        f"A plain transformers model with weights in {dtype}: the base and {len(words)} new tokens, `{words[0]}` to "
        f"`{words[-1]}`, whose embeddings are the virtual tokens of a soft prompt. It was written by softprompt and "
        "does not need it.",
        "",
        "Run this code in the folder of this file:",
        "",
        "```python",
        "from transformers import pipeline",
        "",
        "ask = pipeline('text-generation', '.')",
        f"print(ask([{_message(adapter)}], return_full_text=False)[0]['generated_text'])",
        "```",
        "",
        f"The chat template writes the new tokens, then the message in the template of the training: `{template}`. "
        "Without the chat template, put all new tokens before your text, in this order:",
        f"`{_all_of(words)}`.",
        "",
        f"The new tokens are never generated: the head is untied, {guard}, and `suppress_tokens` in "
        "generation_config.json lists them. `max_length` in that file counts them.",
        "",
        "Tested with transformers (`generate`, `pipeline`, `transformers serve`) and llama.cpp. An engine that ignores "
        "`lm_head.weight` and ties the head to the embeddings may generate the new tokens; if so, forbid them with a "
        "logit bias.",
        "",
    ]
    return "\n".join(lines).encode()


def _message(adapter: Adapter) -> str:
    """Return Python code for a user message with all texts that the chat template needs."""
    template = saved_template(adapter.settings)
    more = [name for name in template.fields[1:] if name not in template.optional_fields]
    return repr({"role": "user", "content": "…", **dict.fromkeys(more, "…")})


def _all_of(words: Sequence[str]) -> str:
    """Return Python code for the text of all new tokens, whose names differ only in their number."""
    before, _, behind = words[0].rpartition("0")
    return f"''.join(f'{before}{{n}}{behind}' for n in range({len(words)}))"
