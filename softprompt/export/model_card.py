"""The model card (README.md) of an exported model."""

import json
from collections.abc import Sequence

from softprompt.prompt.adapter_io import Adapter
from softprompt.prompt.model_card import front_matter, public_name


def plain_model_card(base: str, adapter: Adapter, words: Sequence[str], constant: float | None, dtype: str) -> bytes:
    """Return the card of a base whose vocabulary contains the prompt as new words, in UTF-8.

    Args:
        base: Folder or hub id of the base; a folder is shown by its name only.
        adapter: The adapter that was exported.
        words: The new words, one for each virtual token.
        constant: The constant logit of the new words; None if it is the mean of the other logits.
        dtype: The dtype of the weights, such as "float32".
    """
    front = front_matter(base, "transformers")
    base, template = public_name(base), json.dumps(adapter.settings.get("template", "default"), ensure_ascii=False)
    guard = (
        f"their logit is {constant:g} whatever the text"
        if constant is not None
        else "their logit is the mean of all others, so none of them is ever the likeliest"
    )
    lines = [
        front,
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
