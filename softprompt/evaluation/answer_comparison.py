"""Held-out rows with the answers of the base alone and with the prompt: some of each kind, and the wrong ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from softprompt.evaluation.evaluator import Evaluation, Evaluator
from softprompt.evaluation.rows import answer_ids, decode_text, question_ids


class AnsweredRow(NamedTuple):
    """A held-out row with two answers.

    Attributes:
        question: The text before the answer, in its template.
        expected: The expected answer; it ends with "…" if it was truncated.
        before, after: The answers of the base alone and with the prompt.
        correct_before, correct_after: Whether they are right; None if the expected answer was truncated.
        loss: The row's mean loss per target with the prompt.
    """

    question: str
    expected: str
    before: str
    after: str
    correct_before: bool | None
    correct_after: bool | None
    loss: float


@dataclass(frozen=True)
class AnswerComparison:
    """The answers of the base alone and with the prompt to the same rows.

    Answers are those that were generated. If none were generated, they are the labels that the rows were classified as.
    """

    evaluator: Evaluator
    before: Evaluation
    after: Evaluation

    @classmethod
    def of(
        cls, evaluator: Evaluator | None, before: Evaluation | None, after: Evaluation | None
    ) -> "AnswerComparison | None":
        """Return the comparison; None if answers are not compared."""
        if evaluator is None or before is None or after is None:
            return None
        return cls(evaluator, before, after) if _answers(before) and _answers(after) else None

    def selected(self, n: int) -> list[AnsweredRow]:
        """Return `n` rows, or more if there are more labels: for each label its first row, a wrong answer if there is
        one, and the first of the other rows."""
        kinds = self.after.classification.expected if self.after.classification else []
        wrong = self._wrong()[:1]
        covered = {kinds[row] for row in wrong} if kinds else set()
        chosen = dict.fromkeys(wrong)
        for row, kind in enumerate(kinds):
            if kind not in covered:
                covered.add(kind)
                chosen[row] = None
        for row in range(len(self.after.row_losses)):
            if len(chosen) >= n:
                break
            chosen[row] = None
        return [self._row(row) for row in sorted(chosen)]

    def wrong(self, n: int) -> list[AnsweredRow]:
        """Return the rows that are answered wrongly with the prompt, the one with the largest loss first, but at most
        `n` of them."""
        return [self._row(row) for row in self._wrong()[:n]]

    def _wrong(self) -> list[int]:
        _, correct = _answers(self.after) or ([], [])
        return sorted((row for row, right in enumerate(correct) if right is False), key=self._loss, reverse=True)

    def _loss(self, row: int) -> float:
        return self.after.row_losses[row] / self.after.row_targets[row]

    def _row(self, row: int) -> AnsweredRow:
        example, tokenizer = self.evaluator.examples[row], self.evaluator.tokenizer
        cut = bool(self.evaluator.missing and self.evaluator.missing[row])
        expected = decode_text(tokenizer, answer_ids(example)) + ("…" if cut else "")
        (before, correct_before), (after, correct_after) = (
            (texts[row], correct[row]) for texts, correct in filter(None, map(_answers, (self.before, self.after)))
        )
        question = decode_text(tokenizer, question_ids(example))
        return AnsweredRow(question, expected, before, after, correct_before, correct_after, self._loss(row))


def _answers(evaluation: Evaluation) -> tuple[Sequence[str], Sequence[bool | None]] | None:
    """Return the answers to all rows, and whether each is right; None if there are none."""
    if evaluation.answers:
        return evaluation.answers, evaluation.correct
    if evaluation.classification:
        return evaluation.classification.predicted, evaluation.classification.correct
    return None
