"""Evaluate a prompt on held-out rows.

loss, perplexity      over all targets of all rows
exact match           share of the rows whose greedy answer equals the expected one; computed only if all expected
                      answers are short, over the rows whose expected answer was not truncated by max_length
accuracy, macro F1    of rows whose expected answers are labels, each classified by its most likely label; over all rows
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any, NamedTuple

from torch import Tensor

from softprompt.data.tokenization import Example, count_targets, end_tokens
from softprompt.engines.base import LossEngine
from softprompt.evaluation.classifier import Classification, Classifier
from softprompt.evaluation.intervals import Interval, ratio_interval, wilson_interval
from softprompt.evaluation.rows import (
    SHORT_ANSWER,
    answer_ids,
    answer_lengths,
    answers_are_short,
    decode_text,
    question_ids,
)
from softprompt.generation.generator import Generator
from softprompt.generation.likelihood import ChoiceResult
from softprompt.generation.requests import GenerationSettings, Request
from softprompt.utils.progress import progress_bar, rows_bar


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation.

    Attributes:
        row_losses: The summed loss of each row's targets.
        row_targets: The number of each row's targets.
        answers: Greedy answers to all rows; None if answers are not compared.
        correct: For each row, whether its answer equals the expected one; None for a row whose expected answer was
            truncated. Empty if answers are not compared.
        classification: None if the rows' answers are not labels.
        expected: The expected answers; empty if answers are not compared.
        disagreements: With distillation, for each row the number of targets at which the most likely token is not the
            teacher's; the losses are then divergences from the teacher. Else None.
    """

    row_losses: Sequence[float]
    row_targets: Sequence[int]
    answers: Sequence[str] | None = None
    correct: Sequence[bool | None] = ()
    classification: Classification | None = None
    expected: Sequence[str] = ()
    disagreements: Sequence[int] | None = None

    def only(self, chosen: Sequence[bool]) -> "Evaluation":
        """Return the evaluation of some of the rows: those for which `chosen` is True."""

        def of(values: Sequence[Any]) -> list[Any]:
            return list(compress(values, chosen))

        some = self.classification
        return Evaluation(
            of(self.row_losses),
            of(self.row_targets),
            None if self.answers is None else of(self.answers),
            of(self.correct),
            some and replace(some, expected=of(some.expected), results=of(some.results)),
            of(self.expected),
            None if self.disagreements is None else of(self.disagreements),
        )

    @property
    def loss(self) -> float:
        """Mean loss over all targets of the rows, in nats per target token."""
        return math.fsum(self.row_losses) / sum(self.row_targets)

    @property
    def perplexity(self) -> float | None:
        """exp(loss); None if it overflows, and with distillation."""
        return math.exp(self.loss) if self.loss < 700 and self.disagreements is None else None

    @property
    def agreement(self) -> float | None:
        """With distillation, the share of targets at which the most likely token is the teacher's; else None."""
        return None if self.disagreements is None else 1 - sum(self.disagreements) / sum(self.row_targets)

    @property
    def compared(self) -> int:
        """Number of rows whose answers are compared, which are those whose expected answer is not truncated."""
        return sum(right is not None for right in self.correct)

    @property
    def exact_match(self) -> float | None:
        """Share of the compared rows whose answer equals the expected one; None if answers are not compared."""
        return sum(right is True for right in self.correct) / self.compared if self.correct else None

    @property
    def loss_interval(self) -> Interval | None:
        """The 95 % interval of the loss, cut off at 0. None if there is one row, or if a loss is not finite."""
        found = ratio_interval(self.row_losses, self.row_targets)
        return found and Interval(max(0.0, found.low), found.high)

    @property
    def accuracy_interval(self) -> Interval | None:
        """The 95 % interval of the accuracy; None if the rows' answers are not labels."""
        correct = self.classification and self.classification.correct
        return wilson_interval(sum(correct), len(correct)) if correct else None

    def metrics(self, suffix: str = "") -> dict[str, float]:
        """Return the metrics named as by transformers' Trainer: eval_loss, eval_perplexity, eval_exact_match,
        eval_exact_match_rows if only some of the rows were compared, eval_accuracy, and eval_macro_f1. A metric that
        does not apply, or that JSON cannot hold (infinity, NaN), is left out. With distillation: eval_loss and eval_kl,
        which are the same, and eval_agreement."""
        metrics = {"loss": self.loss, "perplexity": self.perplexity, "exact_match": self.exact_match}
        if self.agreement is not None:
            metrics |= {"kl": self.loss, "agreement": self.agreement}
        if self.answers and self.compared < len(self.answers):
            metrics["exact_match_rows"] = self.compared
        if self.classification:
            matrix = self.classification.confusion_matrix
            metrics |= {"accuracy": matrix.accuracy, "macro_f1": matrix.macro_f1}
        return {f"eval_{name}{suffix}": v for name, v in metrics.items() if v is not None and math.isfinite(v)}

    def sample_metrics(self) -> dict[str, float]:
        """Return what the number and the answers of the rows say about the other metrics: eval_samples, the number of
        rows; the ends of 95 % intervals, eval_loss_low, eval_loss_high (with distillation eval_kl_low, eval_kl_high),
        eval_accuracy_low and eval_accuracy_high; and eval_majority, the accuracy of always giving the most common
        answer. What does not apply is left out."""
        metrics: dict[str, float] = {"eval_samples": len(self.row_losses)}
        loss = "loss" if self.disagreements is None else "kl"
        for name, interval in ((loss, self.loss_interval), ("accuracy", self.accuracy_interval)):
            if interval:
                metrics |= {f"eval_{name}_low": interval.low, f"eval_{name}_high": interval.high}
        return {**metrics, **({"eval_majority": self.classification.majority[1]} if self.classification else {})}


class Rival(NamedTuple):
    """The evaluation of something that a prompt is compared with, besides the base alone.

    Attributes:
        name: What it is, in a sentence.
        title: The same as the title of a column.
        suffix: The suffix of its metrics.
    """

    name: str
    title: str
    suffix: str
    evaluation: Evaluation


@dataclass(frozen=True)
class Evaluator:
    """Evaluates any prompt on the same held-out rows.

    Attributes:
        generator: Generates the answers for exact match; if it is None, there is no exact match.
        examples: The tokenized rows.
        batch_size: Number of rows that are answered at the same time.
        missing: For each row, how many tokens of its answer were truncated, as in `data.Tokenized`; empty if none.
        classifier: Classifies the rows if their answers are labels; else None.
    """

    engine: LossEngine
    generator: Generator | None
    tokenizer: Any
    examples: Sequence[Example]
    batch_size: int
    missing: Sequence[int] = ()
    classifier: Classifier | None = None

    def __call__(self, prompt: Tensor | None) -> Evaluation:
        """Evaluate a prompt [P, H], or the bare base (None)."""
        classification = None
        with rows_bar(len(self.examples), "held-out loss") as on_rows:
            if self.classifier:
                classification, losses = self.classifier(self.engine, prompt, self.examples, on_rows)
            else:
                losses = self.engine.row_losses(prompt, self.examples, on_rows)
        answers = self._answers(self.generator, prompt) if self.generator and self.compares_answers else None
        return self._evaluation(losses, answers, classification)

    def rivals(self, P: int) -> list[Rival]:
        """Evaluate what else a prompt of P virtual tokens is compared with: nothing."""
        return []

    def costs(self, prompt: Tensor) -> dict[str, float]:
        """Return metrics of what the prompt saves per request: none."""
        return {}

    def answered_rows(self, prompt: Tensor, evaluation: Evaluation) -> list[Any]:
        """Return rows that are answered only to be shown: none, because those that were compared are shown."""
        return []

    def state_of(self, evaluation: Evaluation) -> dict[str, Any]:
        """Return the part of an evaluation that cannot be derived from the rows, as JSON types."""
        predicted = evaluation.classification and evaluation.classification.predicted
        return {"row_losses": list(evaluation.row_losses), "answers": evaluation.answers, "predicted": predicted}

    def restored(self, state: Mapping[str, Any]) -> Evaluation:
        """Return the evaluation for which `state_of` returned `state`. The rows must be the same."""
        classification = None
        if self.classifier and state["predicted"] is not None:
            classification = self.classifier.classification([ChoiceResult(label, {}) for label in state["predicted"]])
        return self._evaluation(state["row_losses"], state["answers"], classification)

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

    def _evaluation(
        self, losses: Sequence[float], answers: Sequence[str] | None, classification: Classification | None
    ) -> Evaluation:
        targets = list(map(count_targets, self.examples))
        if answers is None:
            return Evaluation(losses, targets, classification=classification)
        correct = compare_answers(answers, self.examples, self.missing, self.tokenizer)
        expected = [decode_text(self.tokenizer, answer_ids(example)) for example in self.examples]
        return Evaluation(losses, targets, answers, correct, classification, expected)


def compare_answers(
    answers: Sequence[str], examples: Sequence[Example], missing: Sequence[int], tokenizer: Any
) -> list[bool | None]:
    """Return for each row whether its answer equals the expected one; None if the expected one was truncated."""
    rows = zip(answers, examples, missing or [0] * len(examples), strict=True)
    return [None if cut else answer == decode_text(tokenizer, answer_ids(example)) for answer, example, cut in rows]
