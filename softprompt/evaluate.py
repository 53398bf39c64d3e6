"""Held-out rows: loss and perplexity over all their targets, and exact match where the answers are short."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from softprompt.data import IGNORE, Example, end_tokens
from softprompt.generate import Generator, in_order
from softprompt.model import Engine
from softprompt.requests import GenerationSettings, Request

SHORT_ANSWER = 32  # tokens, the end token among them


@dataclass(frozen=True)
class Evaluation:
    """`loss` is the mean over all targets of the rows; `answers` are greedy, and absent where some answer is long."""

    loss: float
    answers: list[str] | None
    exact_match: float | None

    @property
    def perplexity(self) -> float | None:
        """e to the loss; None where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else None

    def metrics(self, suffix: str = "") -> dict[str, float | None]:
        """Under Trainer's names: eval_loss, eval_perplexity, eval_exact_match."""
        named = {"loss": self.loss, "perplexity": self.perplexity, "exact_match": self.exact_match}
        # a comparison that does not apply has no entry, nor has what JSON cannot hold
        return {f"eval_{name}{suffix}": v for name, v in named.items() if v is not None and math.isfinite(v)}


@dataclass(frozen=True)
class Evaluator:
    """Held-out rows and the means to evaluate any prompt on them; `batch_size` rows are answered together, and none
    without a generator."""

    engine: Engine
    generator: Generator | None
    tokenizer: Any
    examples: Sequence[Example]
    batch_size: int

    @property
    def compares_answers(self) -> bool:
        """Whether there are any, and they are short."""
        return self.generator is not None and max(len(answer_ids(e)) for e in self.examples) <= SHORT_ANSWER

    def __call__(self, prompt: Tensor | None) -> Evaluation:
        """Evaluate a prompt [P, H], or the bare base (None)."""
        loss_sum, targets = self.engine.evaluate(prompt, self.examples)
        loss = loss_sum.item() / targets
        if self.generator is None or not self.compares_answers:
            return Evaluation(loss, None, None)
        answers = self._answers(self.generator, prompt)
        expected = [expected_answer(self.tokenizer, e) for e in self.examples]
        right = sum(a == b for a, b in zip(answers, expected, strict=True))
        return Evaluation(loss, answers, right / len(expected))

    def _answers(self, generator: Generator, prompt: Tensor | None) -> list[str]:
        ends = tuple(end_tokens(self.examples, self.tokenizer))
        settings = GenerationSettings(max_new_tokens=SHORT_ANSWER, do_sample=False, eos_token_id=ends)
        requests = [Request(question_ids(e), settings, prompt) for e in self.examples]
        return [text_of(self.tokenizer, ids) for ids in in_order(generator.generate(requests, self.batch_size))]


def question_ids(example: Example) -> list[int]:
    """Ids of a row before its first target."""
    first = next(i for i, label in enumerate(example.labels) if label != IGNORE)
    return example.input_ids[:first]


def expected_answer(tokenizer: Any, example: Example) -> str:
    return text_of(tokenizer, answer_ids(example))


def answer_ids(example: Example) -> list[int]:
    """Ids of a row's targets."""
    return [label for label in example.labels if label != IGNORE]


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True).strip()
