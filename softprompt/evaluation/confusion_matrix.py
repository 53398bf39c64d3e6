"""Accuracy, macro F1 and confusion matrix of classified rows."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ConfusionMatrix:
    """How often rows with each expected label were classified as each label.

    Attributes:
        labels: The choices in their order, then those expected answers that are none of the choices; rows with such an
            answer are never classified correctly.
        counts: Number of rows by (expected label, predicted label).
    """

    labels: Sequence[str]
    counts: Mapping[tuple[str, str], int]

    @classmethod
    def of_pairs(cls, choices: Sequence[str], expected: Sequence[str], predicted: Sequence[str]) -> "ConfusionMatrix":
        """Count the pairs of expected answer and predicted choice over the rows."""
        return cls(list(dict.fromkeys([*choices, *expected])), Counter(zip(expected, predicted, strict=True)))

    @property
    def rows(self) -> list[list[int]]:
        """The counts as a square matrix, with a row for each expected label and a column for each predicted one."""
        return [[self.counts.get((expected, predicted), 0) for predicted in self.labels] for expected in self.labels]

    @property
    def accuracy(self) -> float:
        """Share of the rows that are classified correctly."""
        return sum(self.counts.get((label, label), 0) for label in self.labels) / sum(self.counts.values())

    @property
    def macro_f1(self) -> float:
        """Mean of the labels' F1 scores, 2 · correct / (rows with the label + rows predicted as it); a label with no
        such rows counts as 0."""
        scores = []
        for label in self.labels:
            expected, predicted = (sum(n for pair, n in self.counts.items() if pair[side] == label) for side in (0, 1))
            correct = self.counts.get((label, label), 0)
            scores.append(2 * correct / (expected + predicted) if expected + predicted else 0.0)
        return sum(scores) / len(scores)

    @property
    def text_rows(self) -> list[list[str]]:
        """The matrix as the rows of a table, with the labels in the first row and in the first column."""
        head = ["expected \\ predicted", *self.labels]
        return [head, *([label, *map(str, row)] for label, row in zip(self.labels, self.rows, strict=True))]
