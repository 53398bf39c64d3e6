"""Model card of an exported model."""

import json
from collections.abc import Sequence

from softprompt.prompt.adapter_folder import _front, _public
from softprompt.prompt.adapter_io import Adapter


def plain_model_card(base: str, adapter: Adapter, words: Sequence[str], constant: float | None, dtype: str) -> bytes:
    """Of a base with the prompt as `words`; `constant` is their logit, None where it is the mean of the others'."""
    front = _front(base, "transformers", ["prompt-tuning"])
    base, template = _public(base), json.dumps(adapter.settings.get("template", "default"), ensure_ascii=False)
    guard = (
        f"their logit is {constant:g} whatever the text"
        if constant is not None
        else "their logit is the mean of all others, so none of them is ever the likeliest"
    )
    lines = [
        *front,
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
