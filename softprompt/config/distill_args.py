"""Settings of distillation: a long text that the learned prompt is to replace."""

from dataclasses import dataclass
from typing import ClassVar

from softprompt.config.schema import option

DEFAULT_DISTILLED_TOKENS = 16  # virtual tokens that replace a text


@dataclass(frozen=True)
class DistillationArguments:
    """Distillation: learn a prompt that replaces a long text, from questions without answers."""

    _argument_group_name: ClassVar[str] = "distillation"
    _everyday: ClassVar[tuple[str, ...]] = ("distill_prompt",)

    distill_prompt: str | None = option(
        None,
        "Learn a prompt that makes the base answer as it does with the text of this file before the question. "
        "--dataset holds the questions: a .txt with one on each line, or rows, whose answers are not used. The prompt "
        f"starts with the text's first tokens, {DEFAULT_DISTILLED_TOKENS} by default. (default: train on the answers "
        "of --dataset)",
        "FILE",
    )
    distill_samples: int = option(
        4,
        "With --distill_prompt, sample this many answers to each training question from the base with the text. A "
        "held-out question is answered once, greedily.",
    )
    distill_max_new_tokens: int = option(
        128, "With --distill_prompt, end an answer of the base with the text after this many tokens."
    )
