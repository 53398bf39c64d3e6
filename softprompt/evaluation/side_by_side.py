"""Evaluate adapters side by side on one dataset.

The table has these metrics:

loss, perplexity              over all targets of the rows; on a plain text, over all its tokens except the first
exact match                   over the rows whose expected answer is not truncated; see `evaluator`
accuracy (most likely label)  if the answers are labels: the share of all rows whose most likely label is the expected
macro F1                      of the same classification; a confusion matrix of each adapter follows the table

All adapters are evaluated on the same rows, truncated in the same way. A training run evaluates its held-out rows with
the same `Evaluator`, so it finds the same values.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from softprompt.config.data_args import is_mini_task
from softprompt.config.infer_args import Voting
from softprompt.data.build_data import mini_task_rows
from softprompt.data.dataset import Row, load_rows
from softprompt.data.encoding import passages
from softprompt.data.row_store import RowStore
from softprompt.data.template import Template
from softprompt.data.tokenization import Tokenized, tokenize
from softprompt.engines.base import LossEngine
from softprompt.evaluation.classifier import Classifier, distinct_answers, labels_of_rows
from softprompt.evaluation.ensemble import EnsembleMember, evaluate_ensemble
from softprompt.evaluation.evaluator import Evaluation, Evaluator
from softprompt.evaluation.truncation import Truncation
from softprompt.generation.adapters import LoadedAdapter
from softprompt.generation.generator import Generator
from softprompt.generation.likelihood import check_choices
from softprompt.generation.voting import vote_choice
from softprompt.utils.errors import ConfigError, DataError


@dataclass(frozen=True)
class AdapterResult:
    """Result of evaluating one adapter.

    Attributes:
        template: The template with which the rows were tokenized; for the bare base, that of the reference adapter.
        data: The tokenized rows.
        rows: The same rows as texts; empty for a plain text.
        notes: Sentences about these rows for the user.
    """

    adapter: LoadedAdapter
    template: Template
    data: Tokenized
    rows: Sequence[Row]
    evaluation: Evaluation
    notes: Sequence[str] = ()

    @property
    def member(self) -> EnsembleMember:
        """This adapter as a member of an ensemble."""
        data, answers = self.data, self.evaluation.answers
        return EnsembleMember(self.adapter.prompt, self.template, self.rows, data.examples, answers, data.missing)


@dataclass(frozen=True)
class AdapterEvaluator:
    """Evaluates any adapter on the rows of one dataset.

    Attributes:
        generator: Generates the answers for exact match; if it is None, there is no exact match.
        dataset: A dataset as train.py takes it, mini:TASK, or a .txt file, whose plain text is evaluated without a
            template.
        batch_size: Number of rows that are answered at the same time.
        choices: The labels. If None, the labels are the answers that occur, if they are short and few; see
            `classifier.labels_of_rows`.
        reference: The adapter whose template and columns are used for the bare base.
        columns: The dataset's column name for each of the template's columns, for all adapters. These override each
            adapter's own column names, which are used only if the dataset has such columns.
        split: Split of the dataset, as in --eval_split.
        max_positions: The base's number of positions; None if it has no limit.
    """

    engine: LossEngine
    generator: Generator | None
    tokenizer: Any
    dataset: str
    truncation: Truncation
    batch_size: int
    choices: Sequence[str] | None
    reference: LoadedAdapter
    columns: Mapping[str, str] = field(default_factory=dict)
    split: str | None = None
    max_positions: int | None = None

    def __call__(self, adapter: LoadedAdapter) -> AdapterResult:
        """Evaluate one adapter.

        Raises:
            DataError: See `dataset.load_rows` and `tokenization.tokenize`; or no row's answer is one of the choices.
            ConfigError: The choices are invalid, or are given for a plain text.
        """
        source = self.reference if adapter.prompt is None else adapter  # of template and columns
        if self.dataset.lower().endswith(".txt"):
            return self._evaluate_text(adapter, source.template)
        all_rows, template, length = self._rows(source), source.template, self.truncation.max_length
        data = tokenize(all_rows, self.tokenizer, template, length, self.truncation.truncation_side)
        rows = [all_rows[number] for number in data.kept]
        labels = self._labels(rows, data, template)
        classifier = Classifier.of_rows(rows, labels, template, self.tokenizer, self.max_positions) if labels else None
        evaluator = Evaluator(
            self.engine, self.generator, self.tokenizer, data.examples, self.batch_size, data.missing, classifier
        )
        notes = [self._describe(data), *([evaluator.exact_match_note] if evaluator.exact_match_note else [])]
        return AdapterResult(adapter, template, data, rows, evaluator(adapter.prompt), notes)

    def _evaluate_text(self, adapter: LoadedAdapter, template: Template) -> AdapterResult:
        """Evaluate an adapter on a plain text, cut into passages of max_length tokens."""
        if self.choices is not None:
            raise ConfigError(f"--choices needs rows with answers, and {self.dataset} is a plain text; leave it out")
        examples = passages(self.dataset, self.tokenizer, self.truncation.max_length)
        evaluator, n = Evaluator(self.engine, None, self.tokenizer, examples, self.batch_size), len(examples)
        data = Tokenized(examples, list(range(n)), [0] * n, n, 0, 0, 0)
        return AdapterResult(adapter, template, data, [], evaluator(adapter.prompt))

    def evaluate_ensemble(self, members: Sequence[AdapterResult], voting: Voting | None) -> AdapterResult:
        """Evaluate the ensemble of adapters that have been evaluated one by one; see `ensemble.evaluate_ensemble` and,
        for labels, `voting.vote_choice`.

        Raises:
            ConfigError: At this max_length, the members' templates leave out different rows or truncate different
                answers.
        """
        first = members[0]
        kept = [[(row, cut > 0) for row, cut in zip(one.data.kept, one.data.missing, strict=True)] for one in members]
        if any(one != kept[0] for one in kept):
            raise ConfigError(
                f"--ensemble: at --max_length {self.truncation.max_length}, the adapters' templates truncate different "
                f"answers of {self.dataset}; give a larger --max_length"
            )
        evaluation = evaluate_ensemble(
            self.engine, self.tokenizer, [one.member for one in members], voting or "majority_vote"
        )
        if first.evaluation.classification is not None:
            of_members = [one.evaluation.classification.results for one in members if one.evaluation.classification]
            results = [vote_choice(of_row, voting or "mean_likelihood") for of_row in zip(*of_members, strict=True)]
            evaluation = replace(evaluation, classification=replace(first.evaluation.classification, results=results))
        return replace(first, evaluation=evaluation)

    def _labels(self, rows: Sequence[Row], data: Tokenized, template: Template) -> dict[str, str]:
        """Return the labels of the rows, each with the text that is scored for it; see `labels_of_rows`."""
        if self.choices is None:
            return labels_of_rows(rows, data, template)
        check_choices(self.choices)
        choices, texts = self.choices, distinct_answers(map(template.own_answer, rows))
        if not set(texts) & set(choices):
            raise DataError(
                f"--choices {','.join(choices)}: no row of {self.dataset} has one of them as its answer; the "
                f"first has {next(iter(texts))!r:.80}"
            )
        return {choice: texts.get(choice, choice) for choice in choices}

    def _rows(self, source: LoadedAdapter) -> RowStore:
        """Read the dataset with the template and the columns of `source`."""
        if is_mini_task(self.dataset):
            return mini_task_rows(self.dataset, "eval", source.template)
        return load_rows(
            self.dataset,
            source.template,
            self.columns,
            usual_columns=source.columns,
            split=self.split,
            flag="--eval_split",
        )

    def _describe(self, data: Tokenized) -> str:
        """Describe the number of rows and how they were truncated."""
        how = self.truncation
        return f"{self.dataset} at --max_length {how.max_length} --truncation_side {how.truncation_side}: {data}"
