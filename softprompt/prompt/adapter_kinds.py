"""Which kinds of PEFT adapters are supported: soft prompts of causal language models.

Such an adapter consists only of vectors that precede the text. Every other kind is refused with a reason.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softprompt.utils.errors import AdapterError

KIND, TASK = "PROMPT_TUNING", "CAUSAL_LM"
REASONS = {
    "PREFIX_TUNING": "it holds keys and values for every layer, not vectors before the text",
    "P_TUNING": "its prompt is the output of an encoder network",
    "MULTITASK_PROMPT_TUNING": "its prompt is a shared prompt multiplied by a task's factors",
    "CPT": "its prompt is the tokens of examples plus learned offsets",
    "CARTRIDGE": "it holds keys and values for every layer, not vectors before the text",
    "TRAINABLE_TOKENS": "it changes embeddings of the base instead of adding vectors before the text",
}
OTHER_KIND = "it changes the layers of the base instead of adding vectors before the text"
TASKS = {
    "SEQ_CLS": "it has a classification head and generates no text",
    "TOKEN_CLS": "it has a head that classifies tokens, and generates no text",
    "QUESTION_ANS": "it has a head that marks a span of the text, and generates no text",
    "FEATURE_EXTRACTION": "it returns hidden states and generates no text",
    "SEQ_2_SEQ_LM": "its base has an encoder and a decoder",
}
USE_PEFT = "use the adapter with PEFT itself"


def check_kind(path: Path, config: Mapping[str, Any]) -> None:
    """Raise AdapterError if a configuration is not that of a soft prompt for a causal language model.

    PEFT allows `task_type` to be null or absent, so both are accepted.

    Args:
        path: The file of the configuration, for the message.
        config: PEFT's configuration.
    """
    kind, task = config.get("peft_type"), config.get("task_type")
    if kind != KIND:
        reason = REASONS.get(kind, OTHER_KIND) if kind and isinstance(kind, str) else "this is not the name of a kind"
        raise AdapterError(f"{path}: peft_type is {kind!r:.80}, expected {KIND!r}: {reason}; {USE_PEFT}")
    if task not in (None, TASK):
        reason = (
            TASKS.get(task, "it is not for a causal language model") if isinstance(task, str) else "this is not a task"
        )
        raise AdapterError(f"{path}: task_type is {task!r:.80}, expected {TASK!r}: {reason}; {USE_PEFT}")
    parts = config.get("num_transformer_submodules")
    if parts not in (None, 1):
        raise AdapterError(
            f"{path}: num_transformer_submodules is {parts!r:.80}, expected 1: it has a prompt for each part of an "
            f"encoder-decoder; {USE_PEFT}"
        )
    if modules := config.get("modules_to_save"):
        raise AdapterError(
            f"{path}: modules_to_save is {modules!r:.80}, expected null: it also changes weights of the base; "
            f"{USE_PEFT}"
        )
