"""Select held-out rows to show with two answers: that of the base alone, and that with the prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
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
    """The answers of the base alone and with the prompt to the same rows."""

    evaluator: Evaluator
    before: Evaluation
    after: Evaluation
    answers_before: Sequence[str]
    answers_after: Sequence[str]

    @classmethod
    def of(
        cls, evaluator: Evaluator | None, before: Evaluation | None, after: Evaluation | None
    ) -> "AnswerComparison | None":
        """Return the comparison; None if answers are not compared."""
        if evaluator is None or before is None or after is None or not before.answers or not after.answers:
            return None
        return cls(evaluator, before, after, before.answers, after.answers)

    def selected(self, n: int) -> list[AnsweredRow]:
        """Return `n` rows, in the order of the dataset: the wrongly answered row with the largest loss, the first row
        of each other label, and then the first of the remaining rows. If there are more labels than `n`, there are
        more rows."""
        kinds = self.after.classification.expected if self.after.classification else []
        chosen = self._wrong()[:1]
        covered = {kinds[row] for row in chosen} if kinds else set()
        for row, kind in enumerate(kinds):
            if kind not in covered:
                covered.add(kind)
                chosen.append(row)
        others = (row for row in range(len(self.after.row_losses)) if row not in chosen)
        chosen += islice(others, max(0, n - len(chosen)))
        return [self._row(row) for row in sorted(chosen)]

    def wrong(self, n: int) -> list[AnsweredRow]:
        """Return up to `n` rows that are answered wrongly with the prompt, the one with the largest loss first."""
        return [self._row(row) for row in self._wrong()[:n]]

    def _wrong(self) -> list[int]:
        rows = [row for row, right in enumerate(self.after.correct) if right is False]
        return sorted(rows, key=self._loss, reverse=True)

    def _loss(self, row: int) -> float:
        return self.after.row_losses[row] / self.after.row_targets[row]

    def _row(self, row: int) -> AnsweredRow:
        example, tokenizer = self.evaluator.examples[row], self.evaluator.tokenizer
        expected = decode_text(tokenizer, answer_ids(example))
        cut = self.after.correct[row] is None
        return AnsweredRow(
            decode_text(tokenizer, question_ids(example)),
            f"{expected}…" if cut else expected,
            self.answers_before[row],
            self.answers_after[row],
            self.before.correct[row],
            self.after.correct[row],
            self._loss(row),
        )
