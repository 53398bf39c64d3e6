"""Adapters side by side on a file of rows with answers: loss, perplexity, exact match, and for labels accuracy, macro
F1 and which label was taken for which; on a plain text loss and perplexity."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from softprompt import mini
from softprompt.adapters import Tuned
from softprompt.confusion import Confusion
from softprompt.data import Example, tokenize
from softprompt.ensemble import joint_verdict
from softprompt.errors import ConfigError, DataError
from softprompt.evaluate import SHORT_ANSWER, Evaluation, Evaluator, answer_ids, expected_answer
from softprompt.generate import Generator
from softprompt.infer_config import Voting
from softprompt.joint import Member, joint_evaluation, scores
from softprompt.model import Engine
from softprompt.passages import passages
from softprompt.rows import Row, load_rows
from softprompt.scores import Verdict, check_choices, verdict
from softprompt.tables import table
from softprompt.template import Template

MOST_LABELS = 20  # among the answers; a file with more is no classification


@dataclass(frozen=True)
class Judged:
    """What was found of an adapter: its examples with the answers they expect, and a verdict on each where the answers
    are labels."""

    tuned: Tuned
    template: Template
    examples: Sequence[Example]
    expected: Sequence[str]
    evaluation: Evaluation
    verdicts: Sequence[Verdict] | None = None

    @property
    def member(self) -> Member:
        return Member(self.tuned.prompt, self.template, self.examples, self.evaluation.answers)

    @property
    def confusion(self) -> Confusion | None:
        return None if self.verdicts is None else Confusion.of(self.expected, self.verdicts)


@dataclass(frozen=True)
class Judge:
    """What evaluates any adapter on the rows of `dataset`: a dataset as train.py takes it, mini:TASK, or a .txt, whose
    text stands behind the prompt as it is. Labels are the `choices`, else the answers that occur, where they are short
    and at most 20. The bare base (whose prompt is None) is asked in the template of `like`."""

    engine: Engine
    generator: Generator | None
    tokenizer: Any
    dataset: str
    max_length: int
    batch_size: int
    choices: Sequence[str] | None
    like: Template
    split: str | None = None  # of the dataset, as --eval_split names it

    def __call__(self, tuned: Tuned) -> Judged:
        """Raises DataError as of `rows.load_rows` and `data.tokenize`, or where no row's answer is among the choices;
        ConfigError for choices that are none, or that stand beside a plain text."""
        template = self.like if tuned.prompt is None else tuned.template
        if self.dataset.lower().endswith(".txt"):
            if self.choices is not None:
                raise ConfigError(f"--choices needs rows with answers, and {self.dataset} is a plain text")
            examples = passages(self.dataset, self.tokenizer, self.max_length)
            evaluator = Evaluator(self.engine, None, self.tokenizer, examples, self.batch_size)
            return Judged(tuned, template, examples, [], evaluator(tuned.prompt))
        examples = tokenize(self._rows(template), self.tokenizer, template, self.max_length).examples
        evaluator = Evaluator(self.engine, self.generator, self.tokenizer, examples, self.batch_size)
        expected = [expected_answer(self.tokenizer, e) for e in examples]
        labels = self._labels(examples, expected)
        judged = Judged(tuned, template, examples, expected, evaluator(tuned.prompt))
        if not labels:
            return judged
        each = scores(self.engine, self.tokenizer, judged.member, labels)
        return replace(judged, verdicts=[verdict(one, labels) for one in each])

    def together(self, members: Sequence[Judged], voting: Voting | None) -> Judged:
        """The members' ensemble. Its loss is that of the mean of their likelihoods, row by row.

        Raises:
            ConfigError: members whose templates leave different rows.
        """
        first = members[0]
        if any(one.expected != first.expected for one in members):
            raise ConfigError(
                f"--ensemble: at --max_length {self.max_length} the adapters' templates keep different answers of "
                f"{self.dataset}; give a larger one"
            )
        evaluation = joint_evaluation(
            self.engine, self.tokenizer, [one.member for one in members], voting or "majority_vote"
        )
        verdicts = None
        if first.verdicts is not None:
            each = zip(*(one.verdicts or () for one in members), strict=True)
            verdicts = [joint_verdict(some, voting or "mean_likelihood") for some in each]
        return Judged(first.tuned, first.template, first.examples, first.expected, evaluation, verdicts)

    def _labels(self, examples: Sequence[Example], expected: Sequence[str]) -> list[str]:
        """None of them where the rows are no classification."""
        if self.choices is not None:
            check_choices(self.choices)
            if not set(expected) & set(self.choices):
                raise DataError(
                    f"--choices {','.join(self.choices)}: no row of {self.dataset} has one of them for its answer; the "
                    f"first has {expected[0]!r:.80}"
                )
            return list(self.choices)
        labels = list(dict.fromkeys(expected))
        short = max(len(answer_ids(e)) for e in examples) <= SHORT_ANSWER
        return labels if short and 2 <= len(labels) <= MOST_LABELS and all(labels) else []

    def _rows(self, template: Template) -> list[Row]:
        task = self.dataset.removeprefix("mini:")
        if task != self.dataset:
            return mini.rows(task, "eval")
        return load_rows(self.dataset, template, {}, split=self.split, flag="--eval_split")


def report(found: Mapping[str, Judged]) -> str:
    """Adapters as columns, figures that some have as rows, then each adapter's confusion."""
    figures: dict[str, list[str]] = {}
    for one in found.values():
        evaluation, confusion = one.evaluation, one.confusion
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
    kept = {name: values for name, values in figures.items() if set(values) != {"–"}}
    shown = [table([["", *found], *([name, *values] for name, values in kept.items())])]
    shown += [f"{name}:\n{one.confusion}" for name, one in found.items() if one.confusion]
    return "\n\n".join([*shown, *_told_of_others(next(iter(found.values())))])


def _told_of_others(one: Judged) -> list[str]:
    """Rows with an answer that is none of the choices."""
    if not one.verdicts:
        return []
    others = [answer for answer in one.expected if answer not in one.verdicts[0].probabilities]
    told = f"{len(others):,} of {len(one.expected):,} rows have an answer that is none of the choices"
    return [f"{told}, the first {others[0]!r:.80}; they count as wrong"] if others else []
