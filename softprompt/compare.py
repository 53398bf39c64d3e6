"""Adapters side by side on a file of rows with answers: loss, perplexity, exact match, and for labels accuracy, macro
F1 and which label was taken for which."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from softprompt import mini
from softprompt.adapters import Tuned
from softprompt.data import tokenize
from softprompt.evaluate import SHORT_ANSWER, Evaluation, Evaluator, answer_ids, question_ids
from softprompt.generate import Generator
from softprompt.model import Engine
from softprompt.rows import Row, load_rows
from softprompt.scores import answer_examples, verdicts
from softprompt.tables import table
from softprompt.template import Template

MOST_LABELS = 20  # among the answers; a file with more is no classification


@dataclass(frozen=True)
class Confusion:
    """How often a row of one label (first) was taken for another (second)."""

    labels: Sequence[str]
    counts: Mapping[tuple[str, str], int]

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


@dataclass(frozen=True)
class Judge:
    """What evaluates any adapter on the rows of `dataset`, a dataset as train.py takes it or mini:TASK; labels are the
    `choices`, else the answers that occur, where they are short and at most 20. The bare base (whose prompt is None) is
    asked in the template of `like`."""

    engine: Engine
    generator: Generator
    tokenizer: Any
    dataset: str
    max_length: int
    batch_size: int
    choices: Sequence[str] | None
    like: Template

    def __call__(self, tuned: Tuned) -> tuple[Evaluation, Confusion | None]:
        """Raises DataError as of `rows.load_rows` and `data.tokenize`."""
        template = self.like if tuned.prompt is None else tuned.template
        examples = tokenize(self._rows(template), self.tokenizer, template, self.max_length).examples
        evaluator = Evaluator(self.engine, self.generator, self.tokenizer, examples, self.batch_size)
        evaluation = evaluator(tuned.prompt)
        expected = [evaluator.text(answer_ids(e)) for e in examples]
        labels = list(self.choices or dict.fromkeys(expected))
        short = max(len(answer_ids(e)) for e in examples) <= SHORT_ANSWER
        if not short or not 2 <= len(labels) <= MOST_LABELS or not all(labels):
            return evaluation, None
        of_labels = answer_examples([question_ids(e) for e in examples], labels, template, self.tokenizer)
        taken = [verdict.label for verdict in verdicts(self.engine, tuned.prompt, of_labels, labels)]
        counts = Counter(zip(expected, taken, strict=True))
        return evaluation, Confusion(list(dict.fromkeys([*labels, *expected])), counts)

    def _rows(self, template: Template) -> list[Row]:
        task = self.dataset.removeprefix("mini:")
        return mini.rows(task, "eval") if task != self.dataset else load_rows(self.dataset, template, {})


def report(found: Mapping[str, tuple[Evaluation, Confusion | None]]) -> str:
    """Adapters as columns, figures as rows, then each adapter's confusion."""
    figures: dict[str, list[str]] = {}
    for evaluation, confusion in found.values():
        perplexity, match = evaluation.perplexity, evaluation.exact_match
        values = {
            "loss": f"{evaluation.loss:.4f}",
            "perplexity": "–" if perplexity is None else f"{perplexity:,.4g}",
            "exact match": "–" if match is None else f"{match:.1%}",
            "accuracy (likelier label)": "–" if confusion is None else f"{confusion.accuracy:.1%}",
            "macro F1": "–" if confusion is None else f"{confusion.macro_f1:.3f}",
        }
        for name, value in values.items():
            figures.setdefault(name, []).append(value)
    shown = [table([["", *found], *([name, *values] for name, values in figures.items())])]
    shown += [f"{name}:\n{confusion}" for name, (_, confusion) in found.items() if confusion]
    return "\n\n".join(shown)
