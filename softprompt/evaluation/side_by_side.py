"""Evaluate adapters side by side on one dataset.

The table has these metrics:

loss, perplexity            over all targets of the rows; on a plain text, over all its tokens except the first
exact match                 over the rows whose expected answer is not truncated; see `evaluator`
accuracy (likelier label)   if the answers are labels: the share of all rows whose likeliest label is the expected one
macro F1                    of the same classification; a confusion matrix of each adapter follows the table

All adapters are evaluated on the same rows, truncated in the same way.
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
from softprompt.engines.base import Engine
from softprompt.evaluation.confusion_matrix import ConfusionMatrix
from softprompt.evaluation.ensemble import EnsembleMember, evaluate_ensemble, score_answers
from softprompt.evaluation.evaluator import Evaluation, Evaluator, answers_are_short
from softprompt.generation.adapters import LoadedAdapter
from softprompt.generation.generator import Generator
from softprompt.generation.likelihood import ChoiceResult, check_choices, choice_result
from softprompt.generation.voting import vote_choice
from softprompt.utils.errors import ConfigError, DataError

MAX_LABELS = 20  # a dataset with more different answers is not a classification


@dataclass(frozen=True)
class AdapterResult:
    """Result of evaluating one adapter.

    Attributes:
        template: The template with which the rows were tokenized; for the bare base, that of the reference adapter.
        data: The tokenized rows.
        rows: The same rows as texts.
        expected: The rows' expected answers, without white space at the ends.
        notes: Sentences about these rows for the user.
        predictions: The classification of each row; None if the answers are not labels.
    """

    adapter: LoadedAdapter
    template: Template
    data: Tokenized
    rows: Sequence[Row]
    expected: Sequence[str]
    evaluation: Evaluation
    notes: Sequence[str] = ()
    predictions: Sequence[ChoiceResult] | None = None

    @property
    def member(self) -> EnsembleMember:
        """This adapter as a member of an ensemble."""
        data, answers = self.data, self.evaluation.answers
        return EnsembleMember(self.adapter.prompt, self.template, self.rows, data.examples, answers, data.missing)

    @property
    def confusion_matrix(self) -> ConfusionMatrix | None:
        """None if the answers are not labels."""
        if self.predictions is None:
            return None
        return ConfusionMatrix.from_predictions(self.expected, self.predictions)


@dataclass(frozen=True)
class Truncation:
    """How rows are truncated, which is the same for all adapters. If the adapters were trained with different settings,
    `notes` say which were chosen."""

    max_length: int
    truncation_side: str
    notes: Sequence[str] = ()


def common_truncation(
    adapters: Sequence[LoadedAdapter], max_length: int | None = None, truncation_side: str | None = None
) -> Truncation:
    """Choose how rows are truncated: as the arguments say, else as in the adapters' training.

    If the adapters differ, the largest max_length and the side "input" are used, so that as many answers as possible
    are whole. The bare base is ignored unless there is no adapter with a prompt.
    """
    trained = [adapter for adapter in adapters if adapter.prompt is not None] or list(adapters)
    lengths = sorted({adapter.max_length for adapter in trained})
    sides = sorted({adapter.truncation_side for adapter in trained})
    length, side = max_length or lengths[-1], truncation_side or sides[0]
    notes = []
    if max_length is None and len(lengths) > 1:
        notes.append(
            f"the adapters were trained with --max_length {', '.join(map(str, lengths))}; all are evaluated with "
            f"{length}; give --max_length to choose another length"
        )
    if truncation_side is None and len(sides) > 1:
        notes.append(
            f"the adapters were trained with --truncation_side {' and '.join(sides)}; all are evaluated with {side}; "
            "give --truncation_side to choose the other side"
        )
    return Truncation(length, side, notes)


@dataclass(frozen=True)
class AdapterEvaluator:
    """Evaluates any adapter on the rows of one dataset.

    Attributes:
        generator: Generates the answers for exact match; if it is None, there is no exact match.
        dataset: A dataset as train.py takes it, mini:TASK, or a .txt file, whose plain text is evaluated without a
            template.
        batch_size: Number of rows that are answered at the same time.
        choices: The labels. If None, the labels are the answers that occur, provided that they are short and there are
            at most MAX_LABELS of them.
        reference: The adapter whose template and columns are used for the bare base.
        columns: The dataset's column name for each of the template's columns, for all adapters. These override each
            adapter's own column names, which are used only if the dataset has such columns.
        split: Split of the dataset, as in --eval_split.
    """

    engine: Engine
    generator: Generator | None
    tokenizer: Any
    dataset: str
    truncation: Truncation
    batch_size: int
    choices: Sequence[str] | None
    reference: LoadedAdapter
    columns: Mapping[str, str] = field(default_factory=dict)
    split: str | None = None

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
        evaluator = Evaluator(self.engine, self.generator, self.tokenizer, data.examples, self.batch_size, data.missing)
        answers = [template.own_answer(row) for row in rows]
        labels = self._labels(data, answers)
        notes = [self._describe(data), *([evaluator.exact_match_note] if evaluator.exact_match_note else [])]
        expected = [answer.strip() for answer in answers]
        result = AdapterResult(adapter, template, data, rows, expected, evaluator(adapter.prompt), notes)
        if not labels:
            return result
        scores = score_answers(self.engine, self.tokenizer, result.member, list(labels.values()))
        return replace(result, predictions=[choice_result(row, list(labels)) for row in scores])

    def _evaluate_text(self, adapter: LoadedAdapter, template: Template) -> AdapterResult:
        """Evaluate an adapter on a plain text, cut into passages of max_length tokens."""
        if self.choices is not None:
            raise ConfigError(f"--choices needs rows with answers, and {self.dataset} is a plain text; leave it out")
        examples = passages(self.dataset, self.tokenizer, self.truncation.max_length)
        evaluator, n = Evaluator(self.engine, None, self.tokenizer, examples, self.batch_size), len(examples)
        data = Tokenized(examples, list(range(n)), [0] * n, n, 0, 0, 0)
        return AdapterResult(adapter, template, data, [], [], evaluator(adapter.prompt))

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
        predictions = None
        if first.predictions is not None:
            by_row = zip(*(one.predictions or () for one in members), strict=True)
            predictions = [vote_choice(results, voting or "mean_likelihood") for results in by_row]
        return replace(first, evaluation=evaluation, predictions=predictions)

    def _labels(self, data: Tokenized, answers: Sequence[str]) -> dict[str, str]:
        """Return the labels, each with the text that is scored for it: the answer as it is in the rows, with the white
        space at its ends that was learned in training. Return an empty dict if the rows are not a classification.

        Args:
            answers: The rows' expected answers.
        """
        texts: dict[str, str] = {}
        for answer in answers:
            texts.setdefault(answer.strip(), answer)
        if self.choices is not None:
            check_choices(self.choices)
            if not set(texts) & set(self.choices):
                raise DataError(
                    f"--choices {','.join(self.choices)}: no row of {self.dataset} has one of them as its answer; the "
                    f"first has {next(iter(texts))!r:.80}"
                )
            return {choice: texts.get(choice, choice) for choice in self.choices}
        short = answers_are_short(data.examples, data.missing)
        return texts if short and 2 <= len(texts) <= MAX_LABELS and all(texts) else {}

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
        how, n = self.truncation, len(data.examples)
        rows = data.described(f"{n:,}{f' of {data.rows:,}' if n < data.rows else ''} rows")
        return f"{self.dataset} at --max_length {how.max_length} --truncation_side {how.truncation_side}: {rows}"
