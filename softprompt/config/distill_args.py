"""Settings of distillation: a long text that the learned prompt is to replace."""

from dataclasses import dataclass
from typing import ClassVar

from softprompt.config.schema import option

DEFAULT_DISTILLED_TOKENS = 16  # virtual tokens that replace a text
DEFAULT_DISTILLED_STEPS = 120  # a few dozen questions are few rows, so an epoch would be a few steps


@dataclass(frozen=True)
class DistillationArguments:
    """Distillation: learn a prompt that replaces a long text, from questions without answers."""

    _argument_group_name: ClassVar[str] = "distillation"
    _everyday: ClassVar[tuple[str, ...]] = ("distill_prompt", "distill_context")

    distill_prompt: str | None = option(
        None,
        "Learn a prompt that makes the base answer as it does with the text of this file before the question. "
        "--dataset holds the questions: a .txt with one on each line, or rows, whose answers are not used. The prompt "
        f"starts with the text's first tokens, {DEFAULT_DISTILLED_TOKENS} by default, and is trained for "
        f"{DEFAULT_DISTILLED_STEPS} steps if neither --max_steps nor --num_train_epochs is given. (default: train on "
        "the answers of --dataset)",
        "FILE",
    )
    distill_context: str | None = option(
        None,
        "Like --distill_prompt, for a document. Without --dataset, the base itself writes --distill_questions "
        "questions about the document's passages. (default: none)",
        "FILE",
    )
    distill_questions: int = option(
        64, "With --distill_context and without --dataset, let the base write this many questions."
    )
    distill_samples: int = option(
        4,
        "With --distill_prompt or --distill_context, sample this many answers of the base with the text to each "
        "training question. A held-out question is answered once, greedily.",
    )
    distill_max_new_tokens: int = option(
        128,
        "With --distill_prompt or --distill_context, end an answer of the base with the text after this many tokens.",
    )

    @property
    def text(self) -> str | None:
        """The file of the text that is distilled; None without distillation."""
        return self.distill_prompt or self.distill_context

    @property
    def flag(self) -> str:
        """The flag that names the text, with its value, for messages."""
        return f"--distill_{'prompt' if self.distill_prompt else 'context'} {self.text}"
