"""Classify rows whose answers are a few labels: by the label that is the most likely answer, not by the generated text.

So an answer that the base would word differently can still count as right, and a base that cannot generate can be
evaluated.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

from torch import Tensor

from softprompt.data.dataset import Row
from softprompt.data.template import Template
from softprompt.data.tokenization import Example, Tokenized
from softprompt.engines.base import LossEngine, OnRows, nothing
from softprompt.evaluation.confusion_matrix import ConfusionMatrix
from softprompt.evaluation.rows import answers_are_short, question_ids
from softprompt.generation.likelihood import ChoiceResult, answer_token_ids, choice_result, join

MAX_LABELS = 20  # rows with more different answers are not classified
ROWS_PER_LABEL = 2  # minimum number of rows per label, on average
MAX_TOKENS = 1 << 21  # maximum number of tokens in one pass, which scores each row with every label


@dataclass(frozen=True)
class Classification:
    """Rows with their expected labels, and how they were classified.

    Attributes:
        labels: The labels that rows were classified into.
        expected: The expected answer of each row; an answer that is none of the labels counts as wrong.
        results: The classification of each row. Results that were read from a checkpoint have no probabilities.
    """

    labels: Sequence[str]
    expected: Sequence[str]
    results: Sequence[ChoiceResult]

    @property
    def predicted(self) -> list[str]:
        """The most likely label of each row."""
        return [result.label for result in self.results]

    @property
    def correct(self) -> list[bool]:
        """For each row, whether its most likely label is the expected one."""
        return [label == expected for label, expected in zip(self.predicted, self.expected, strict=True)]

    @property
    def majority(self) -> tuple[str, float]:
        """The most common expected answer, and its share of the rows: the accuracy of always giving this answer."""
        ((answer, rows),) = Counter(self.expected).most_common(1)
        return answer, rows / len(self.expected)

    @property
    def confusion_matrix(self) -> ConfusionMatrix:
        """The confusion matrix of the expected and the predicted labels."""
        return ConfusionMatrix.of_pairs(self.labels, self.expected, self.predicted)


def labels_of_rows(rows: Sequence[Row], data: Tokenized, template: Template) -> dict[str, str]:
    """Return the labels if the expected answers of all rows are a few labels; else an empty dict.

    They are labels if all are short and none is empty, and if there are at least two different ones but at most
    MAX_LABELS, each of them ROWS_PER_LABEL times or more on average. White space at an answer's ends is ignored.

    Args:
        rows: The rows as texts.
        data: The same rows tokenized.

    Returns:
        For each label the text that is scored for it: the answer as it is in the rows, with the white space at its ends
        that was learned in training.
    """
    if not answers_are_short(data.examples, data.missing):
        return {}
    texts = distinct_answers(map(template.own_answer, rows))
    return texts if 2 <= len(texts) <= min(MAX_LABELS, len(rows) / ROWS_PER_LABEL) and all(texts) else {}


def distinct_answers(answers: Iterable[str]) -> dict[str, str]:
    """Return the different answers without white space at their ends, each with its first text in `answers`."""
    texts: dict[str, str] = {}
    for answer in answers:
        texts.setdefault(answer.strip(), answer)
    return texts


@dataclass(frozen=True)
class Classifier:
    """Classifies the same rows by any prompt.

    Attributes:
        labels: The labels.
        expected: The expected answer of each row, without white space at its ends.
        label_ids: For each row the token ids of each label as its answer, end token included.
        max_positions: The base's number of positions, virtual tokens included; None if it has no limit.
    """

    labels: Sequence[str]
    expected: Sequence[str]
    label_ids: Sequence[Sequence[Sequence[int]]]
    max_positions: int | None = None

    @classmethod
    def of_rows(
        cls,
        rows: Sequence[Row],
        labels: Mapping[str, str],
        template: Template,
        tokenizer: Any,
        max_positions: int | None = None,
    ) -> "Classifier":
        """Prepare the classification of rows with answers. `labels` are as `labels_of_rows` returns them.

        Raises:
            DataError: The chat template refuses a label.
        """
        ids = answer_token_ids(rows, list(labels.values()), [template] * len(rows), tokenizer)
        return cls(list(labels), [template.own_answer(row).strip() for row in rows], ids, max_positions)

    @classmethod
    def of_held_out(
        cls,
        rows: Sequence[Row],
        data: Tokenized,
        template: Template,
        tokenizer: Any,
        max_positions: int | None = None,
    ) -> "Classifier | None":
        """Prepare the classification of held-out rows into the labels that their answers are; None if these are not
        labels (see `labels_of_rows`).

        Args:
            rows: The row of each held-out example.
            data: The same rows tokenized.

        Raises:
            DataError: The chat template refuses a label.
        """
        labels = labels_of_rows(rows, data, template)
        return cls.of_rows(rows, labels, template, tokenizer, max_positions) if labels else None

    def longest_row(self, examples: Sequence[Example], P: int) -> int:
        """Return the number of tokens of the longest row that is scored behind P virtual tokens: a question with a
        label, which may be longer than the row's own answer. `examples` are the rows tokenized."""
        rows = zip(examples, self.label_ids, strict=True)
        longest = max(len(question_ids(example)) + max(map(len, labels)) for example, labels in rows)
        return longest if self.max_positions is None else min(longest, self.max_positions - P)

    def __call__(
        self, engine: LossEngine, prompt: Tensor | None, examples: Sequence[Example], on_rows: OnRows = nothing
    ) -> tuple[Classification, list[float]]:
        """Classify the rows with a prompt [P, H], or by the bare base (None).

        Args:
            examples: The rows tokenized.
            on_rows: Called with the number of rows that are done.

        Returns:
            The classification, and the summed loss (nats) of each row's own targets. If these are one of the labels,
            the loss comes from the same pass.
        """
        results: list[ChoiceResult] = []
        losses: list[float] = []
        longest = max(len(example.input_ids) for example in examples)
        at_once = max(1, MAX_TOKENS // (longest * len(self.labels)))
        for start in range(0, len(examples), at_once):
            part = [examples[row] for row in range(start, min(start + at_once, len(examples)))]
            candidates = [self._candidates(row, example, prompt) for row, example in enumerate(part, start)]
            others = [own for own, some in zip(part, candidates, strict=True) if own not in some]
            every = [*chain.from_iterable(candidates), *others]
            # `every` has about as many entries per row as there are labels; progress is reported in rows.
            of_part = partial(_report, on_rows, start, len(part) / len(every))
            scored = iter(engine.row_losses(prompt, every, of_part))
            of_labels = [[next(scored) for _ in some] for some in candidates]
            results += [choice_result([-loss for loss in row], self.labels) for row in of_labels]
            for own, some, of_row in zip(part, candidates, of_labels, strict=True):
                losses.append(of_row[some.index(own)] if own in some else next(scored))
        return self.classification(results), losses

    def classification(self, results: Sequence[ChoiceResult]) -> Classification:
        """Return the classification that consists of the given result of each row."""
        return Classification(self.labels, self.expected, results)

    def _candidates(self, row: int, example: Example, prompt: Tensor | None) -> list[Example]:
        """Return a row with each label as its answer. If a label that is longer than the row's own answer would exceed
        the positions of the base, the beginning of the question is left out."""
        question, labels = question_ids(example), self.label_ids[row]
        if self.max_positions is not None:
            room = self.max_positions - (0 if prompt is None else len(prompt)) - max(map(len, labels))
            question = question[max(0, len(question) - room) :]
        return [join(question, label) for label in labels]


def _report(on_rows: OnRows, before: int, share: float, done: int) -> None:
    """Report progress in rows: the `before` rows of earlier passes, and what `done` candidates of this pass amount to.
    `share` is the number of rows per candidate."""
    on_rows(before + round(share * done))
