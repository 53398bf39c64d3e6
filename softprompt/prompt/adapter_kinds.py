"""Which of PEFT's adapters can answer here: soft prompts of causal language models, which are nothing but vectors
before the text. Every other kind is refused with its name and the reason."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softprompt.utils.errors import AdapterError

KIND, TASK = "PROMPT_TUNING", "CAUSAL_LM"
REASONS = {
    "PREFIX_TUNING": "it holds keys and values for every layer, not vectors before the text",
    "P_TUNING": "its prompt is what an encoder network makes of it",
    "MULTITASK_PROMPT_TUNING": "its prompt is the product of a shared prompt and a task's factors",
    "CPT": "its prompt is made of the tokens of examples and learned changes to them",
    "CARTRIDGE": "it holds keys and values for every layer, not vectors before the text",
    "TRAINABLE_TOKENS": "it changes words of the base instead of adding vectors before the text",
}
INSIDE = "it changes the layers of the base instead of adding vectors before the text"
TASKS = {
    "SEQ_CLS": "it classifies by a head of its own, which writes no text",
    "TOKEN_CLS": "it classifies tokens by a head of its own, which writes no text",
    "QUESTION_ANS": "it marks a span of its text by a head of its own, which writes no text",
    "FEATURE_EXTRACTION": "it makes vectors, no text",
    "SEQ_2_SEQ_LM": "its base has an encoder and a decoder",
}
ELSEWHERE = "use it with PEFT itself"


def check_kind(place: Path, config: Mapping[str, Any]) -> None:
    """Raises AdapterError where the configuration, read from `place`, is of another kind of adapter, of another task,
    or of an adapter that changes weights of the base. PEFT lets task_type be null or absent, so both are taken."""
    kind, task = config.get("peft_type"), config.get("task_type")
    if kind != KIND:
        reason = REASONS.get(kind, INSIDE) if kind and isinstance(kind, str) else "this names no kind"
        raise AdapterError(
            f"{place}: peft_type is {kind!r:.80}, expected {KIND!r}; adapters of other kinds are for PEFT itself: "
            f"{reason}"
        )
    if task not in (None, TASK):
        reason = TASKS.get(task, "it is no causal language model's") if isinstance(task, str) else "that is no task"
        raise AdapterError(f"{place}: task_type is {task!r:.80}, expected {TASK!r}: {reason}; {ELSEWHERE}")
    parts = config.get("num_transformer_submodules")
    if parts not in (None, 1):
        raise AdapterError(
            f"{place}: num_transformer_submodules is {parts!r:.80}, expected 1: it holds a prompt for each part of an "
            f"encoder-decoder; {ELSEWHERE}"
        )
    if modules := config.get("modules_to_save"):
        raise AdapterError(
            f"{place}: modules_to_save is {modules!r:.80}, expected null: it changes weights of the base, too, and a "
            f"soft prompt leaves them as they are; {ELSEWHERE}"
        )
