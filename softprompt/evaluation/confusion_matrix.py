"""Which label was taken for which."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from softprompt.generation.likelihood import ChoiceResult
from softprompt.utils.text_table import table


@dataclass(frozen=True)
class Confusion:
    """How often a row of one label (first) was taken for another (second)."""

    labels: Sequence[str]
    counts: Mapping[tuple[str, str], int]

    @classmethod
    def of(cls, expected: Sequence[str], verdicts: Sequence[ChoiceResult]) -> "Confusion":
        """Labels in the order of the choices, then answers of rows that are none of these: they can never be right."""
        labels = dict.fromkeys([*verdicts[0].probabilities, *expected])
        return cls(list(labels), Counter(zip(expected, (one.label for one in verdicts), strict=True)))

    @property
    def accuracy(self) -> float:
        return sum(self.counts.get((label, label), 0) for label in self.labels) / sum(self.counts.values())

    @property
    def macro_f1(self) -> float:
        """Mean of the labels' F1, 2·right / (rows of the label + rows taken for it); 0 for a label that is neither."""
        scores = []
        for label in self.labels:
            of, taken = (sum(n for pair, n in self.counts.items() if pair[side] == label) for side in (0, 1))
            scores.append(2 * self.counts.get((label, label), 0) / (of + taken) if of + taken else 0.0)
        return sum(scores) / len(scores)

    def __str__(self) -> str:
        head = ["row \\ taken for", *self.labels]
        rows = [[a, *(str(self.counts.get((a, b), 0)) for b in self.labels)] for a in self.labels]
        return table([head, *rows])
