"""Evaluate a prompt on held-out rows.

loss, perplexity   over all targets of all rows
exact match        share of the rows whose greedy answer equals the expected one; computed only if all expected answers
                   are short, over the rows whose expected answer was not truncated by max_length
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from softprompt.data.tokenization import IGNORE, Example, count_targets, end_tokens
from softprompt.engines.base import Engine
from softprompt.generation.generator import Generator
from softprompt.generation.requests import GenerationSettings, Request
from softprompt.utils.progress import progress_bar, rows_bar

SHORT_ANSWER = 32  # the largest number of tokens of an answer that is compared, its end token included


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation.

    Attributes:
        loss: Mean loss over all targets of the rows.
        answers: Greedy answers to all rows; None if answers are not compared.
        exact_match: Share of the compared rows whose answer equals the expected one; None if answers are not compared.
        compared: Number of rows whose answers are compared, which are those whose expected answer is not truncated.
    """

    loss: float
    answers: list[str] | None
    exact_match: float | None
    compared: int = 0

    @property
    def perplexity(self) -> float | None:
        """exp(loss); None if it overflows."""
        return math.exp(self.loss) if self.loss < 700 else None

    def metrics(self, suffix: str = "") -> dict[str, float | None]:
        """Return the metrics named as by transformers' Trainer: eval_loss, eval_perplexity, eval_exact_match, and
        eval_exact_match_rows if only some of the rows were compared. A metric that does not apply, or that JSON cannot
        hold (infinity, NaN), is left out."""
        some = self.compared if self.answers and self.compared < len(self.answers) else None
        metrics = {"loss": self.loss, "perplexity": self.perplexity, "exact_match": self.exact_match}
        metrics["exact_match_rows"] = some
        return {f"eval_{name}{suffix}": v for name, v in metrics.items() if v is not None and math.isfinite(v)}


@dataclass(frozen=True)
class Evaluator:
    """Evaluates any prompt on the same held-out rows.

    Attributes:
        generator: Generates the answers for exact match; if it is None, only the loss is computed.
        examples: The tokenized rows.
        batch_size: Number of rows that are answered at the same time.
        missing: For each row, how many tokens of its answer were truncated, as in `data.Tokenized`; empty if none.
    """

    engine: Engine
    generator: Generator | None
    tokenizer: Any
    examples: Sequence[Example]
    batch_size: int
    missing: Sequence[int] = ()

    def __call__(self, prompt: Tensor | None) -> Evaluation:
        """Evaluate a prompt [P, H], or the bare base (None)."""
        with rows_bar(len(self.examples), "held-out loss") as on_rows:
            loss_sum, targets = self.engine.evaluate(prompt, self.examples, on_rows)
        loss = loss_sum.item() / targets
        if self.generator is None or not self.compares_answers:
            return Evaluation(loss, None, None)
        return compare_answers(loss, self._answers(self.generator, prompt), self.examples, self.missing, self.tokenizer)

    @property
    def compares_answers(self) -> bool:
        """Whether exact match is computed: there is a generator, all expected answers are short, and at least one of
        them is whole."""
        return self.generator is not None and answers_are_short(self.examples, self.missing) and self._whole_answers > 0

    @property
    def exact_match_note(self) -> str | None:
        """A sentence for the user if exact match covers only some of the rows, or none of them; None if it covers all,
        or if there is no generator."""
        n, whole = len(self.examples), self._whole_answers
        if self.generator is None or (self.compares_answers and whole == n):
            return None
        if self.compares_answers:
            return f"exact match is over the {whole:,} of {n:,} rows whose answer max_length does not truncate"
        if not whole:
            # Longer answers are not compared even if they are whole.
            short = answers_are_short(self.examples, self.missing)
            hint = " (a larger --max_length keeps them whole)" if short else ""
            return f"no exact match: max_length truncates the answers of all {n:,} rows{hint}"
        long = sum(length > SHORT_ANSWER for length in answer_lengths(self.examples, self.missing))
        return f"no exact match: {long:,} of {n:,} answers have more than {SHORT_ANSWER} tokens"

    @property
    def _whole_answers(self) -> int:
        """Number of rows whose answer is not truncated."""
        return len(self.examples) - sum(n > 0 for n in self.missing)

    def _answers(self, generator: Generator, prompt: Tensor | None) -> list[str]:
        """Answer all rows greedily, with at most SHORT_ANSWER tokens each."""
        ends = tuple(end_tokens(self.examples, self.tokenizer))
        settings = GenerationSettings(max_new_tokens=SHORT_ANSWER, do_sample=False, eos_token_id=ends)
        requests = [Request(question_ids(example), settings, prompt) for example in self.examples]
        answers: dict[int, list[int]] = {}
        with progress_bar(len(requests), "held-out answers", " rows") as bar:
            for index, ids in generator.generate(requests, self.batch_size):
                answers[index] = ids
                bar.update()
        return [decode_text(self.tokenizer, answers[index]) for index in range(len(requests))]


def compare_answers(
    loss: float, answers: list[str], examples: Sequence[Example], missing: Sequence[int], tokenizer: Any
) -> Evaluation:
    """Compare the answers with the expected ones, on the rows whose expected answer is whole."""
    rows = zip(answers, examples, missing or [0] * len(examples), strict=True)
    whole = [(answer, example) for answer, example, truncated in rows if not truncated]
    if not whole:
        return Evaluation(loss, None, None)
    correct = sum(answer == decode_text(tokenizer, answer_ids(example)) for answer, example in whole)
    return Evaluation(loss, answers, correct / len(whole), len(whole))


def question_ids(example: Example) -> list[int]:
    """Return the token ids of a row before its first target."""
    first = next(i for i, label in enumerate(example.labels) if label != IGNORE)
    return example.input_ids[:first]


def answer_ids(example: Example) -> list[int]:
    """Return the token ids of a row's targets."""
    return [label for label in example.labels if label != IGNORE]


def answer_lengths(examples: Sequence[Example], missing: Sequence[int] = ()) -> list[int]:
    """Return the number of tokens of each row's whole answer, truncated tokens included."""
    rows = zip(examples, missing or [0] * len(examples), strict=True)
    return [count_targets(example) + truncated for example, truncated in rows]


def answers_are_short(examples: Sequence[Example], missing: Sequence[int] = ()) -> bool:
    """Whether the whole answers of all rows have at most SHORT_ANSWER tokens."""
    return max(answer_lengths(examples, missing)) <= SHORT_ANSWER


def decode_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """Decode token ids without special tokens and without white space at the ends."""
    return tokenizer.decode(ids, skip_special_tokens=True).strip()
