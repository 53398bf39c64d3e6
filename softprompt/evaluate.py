"""Held-out rows: loss and perplexity over all their targets, and exact match over whole answers where all are short."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from softprompt.data import IGNORE, Example, count_targets
from softprompt.generate import Generator, in_order
from softprompt.model import Engine
from softprompt.requests import GenerationSettings, Request

SHORT_ANSWER = 32  # tokens, the end token among them


@dataclass(frozen=True)
class Evaluation:
    """`loss` is the mean over all targets of the rows. `answers` are greedy ones to all rows, and `exact_match` is the
    share that is right among the `compared` rows, those whose expected answer is whole; both are None where answers are
    not compared."""

    loss: float
    answers: list[str] | None
    exact_match: float | None
    compared: int = 0

    @property
    def perplexity(self) -> float | None:
        """e to the loss; None where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else None

    def metrics(self, suffix: str = "") -> dict[str, float | None]:
        """Under Trainer's names: eval_loss, eval_perplexity, eval_exact_match, and eval_exact_match_rows where not all
        rows were compared."""
        some = self.compared if self.answers and self.compared < len(self.answers) else None
        named = {"loss": self.loss, "perplexity": self.perplexity, "exact_match": self.exact_match}
        named["exact_match_rows"] = some
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
        """Whether answers can be written, all expected ones are short, and some of these are whole."""
        short = all(answer_length(e) <= SHORT_ANSWER for e in self.examples)
        return self.generator is not None and short and not all(e.missing for e in self.examples)

    @property
    def told(self) -> str | None:
        """A sentence on the exact match where it is not that of all rows; None where it is, or where no answer can be
        written."""
        n, cut = len(self.examples), sum(e.missing > 0 for e in self.examples)
        if self.generator is None or (self.compares_answers and not cut):
            return None
        if self.compares_answers:
            return (
                f"exact match is over the {n - cut:,} of {n:,} rows whose answer is whole; max_length cuts the others"
            )
        if cut == n:
            return f"no exact match: max_length cuts the answers of all {n:,} rows (a larger --max_length keeps them)"
        long = sum(answer_length(e) > SHORT_ANSWER for e in self.examples)
        return f"no exact match: {long:,} of {n:,} answers have more than {SHORT_ANSWER} tokens"

    def __call__(self, prompt: Tensor | None) -> Evaluation:
        """Evaluate a prompt [P, H], or the bare base (None)."""
        loss_sum, targets = self.engine.evaluate(prompt, self.examples)
        loss = loss_sum.item() / targets
        if self.generator is None or not self.compares_answers:
            return Evaluation(loss, None, None)
        return compared(loss, self._answers(self.generator, prompt), self.examples, self.tokenizer)

    def _answers(self, generator: Generator, prompt: Tensor | None) -> list[str]:
        settings = GenerationSettings(max_new_tokens=SHORT_ANSWER, do_sample=False)
        requests = [Request(question_ids(e), settings, prompt) for e in self.examples]
        return [text_of(self.tokenizer, ids) for ids in in_order(generator.generate(requests, self.batch_size))]


def compared(loss: float, answers: list[str], examples: Sequence[Example], tokenizer: Any) -> Evaluation:
    """The evaluation of answers to rows, of which those are compared whose expected answer is whole."""
    whole = [(a, e) for a, e in zip(answers, examples, strict=True) if not e.missing]
    if not whole:
        return Evaluation(loss, None, None)
    right = sum(answer == expected_answer(tokenizer, example) for answer, example in whole)
    return Evaluation(loss, answers, right / len(whole), len(whole))


def question_ids(example: Example) -> list[int]:
    """Ids of a row before its first target."""
    first = next(i for i, label in enumerate(example.labels) if label != IGNORE)
    return example.input_ids[:first]


def expected_answer(tokenizer: Any, example: Example) -> str:
    return text_of(tokenizer, answer_ids(example))


def answer_ids(example: Example) -> list[int]:
    """Ids of a row's targets."""
    return [label for label in example.labels if label != IGNORE]


def answer_length(example: Example) -> int:
    """Tokens of a row's whole answer, those that were cut off among them."""
    return count_targets(example) + example.missing


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True).strip()
