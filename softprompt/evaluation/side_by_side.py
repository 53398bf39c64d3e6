"""Adapters side by side on a file of rows with answers: loss, perplexity, exact match, and for labels accuracy, macro
F1 and which label was taken for which; on a plain text loss and perplexity."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from softprompt import mini
from softprompt.config.infer_args import Voting
from softprompt.data.dataset import Row, check_fields, load_rows
from softprompt.data.passages import passages
from softprompt.data.template import Template
from softprompt.data.tokenization import Tokenized, tokenize
from softprompt.engines.base import Engine
from softprompt.evaluation.confusion import Confusion
from softprompt.evaluation.ensemble_eval import Member, joint_evaluation, scores
from softprompt.evaluation.evaluator import Evaluation, Evaluator, are_short
from softprompt.generation.adapters import LoadedAdapter
from softprompt.generation.hf_generate import Generator
from softprompt.generation.likelihood import ChoiceResult, check_choices, choice_result
from softprompt.generation.voting import joint_verdict
from softprompt.utils.errors import ConfigError, DataError
from softprompt.utils.text_table import table

MOST_LABELS = 20  # among the answers; a file with more is no classification


@dataclass(frozen=True)
class AdapterResult:
    """What was found of an adapter: the examples that it was judged by, their rows, the rows' own answers (as they are
    shown), its evaluation, what a reader must know of these rows, and a verdict on each row where the answers are
    labels."""

    tuned: LoadedAdapter
    template: Template
    data: Tokenized
    rows: Sequence[Row]
    expected: Sequence[str]
    evaluation: Evaluation
    told: Sequence[str] = ()
    verdicts: Sequence[ChoiceResult] | None = None

    @property
    def member(self) -> Member:
        data, answers = self.data, self.evaluation.answers
        return Member(self.tuned.prompt, self.template, self.rows, data.examples, answers, data.missing)

    @property
    def confusion(self) -> Confusion | None:
        return None if self.verdicts is None else Confusion.of(self.expected, self.verdicts)


@dataclass(frozen=True)
class Cut:
    """How rows are cut: the same for all adapters that are judged side by side, so that they are judged by the same
    rows. `told` says which settings were taken where those of the adapters differ."""

    max_length: int
    truncation_side: str
    told: Sequence[str] = ()


def common_cut(
    adapters: Sequence[LoadedAdapter], max_length: int | None = None, truncation_side: str | None = None
) -> Cut:
    """What is given, else what the adapters were trained with. Where they differ, the largest length is taken, and the
    question is what is cut: so the most answers are whole. The bare base counts only where there is nothing else."""
    some = [one for one in adapters if one.prompt is not None] or list(adapters)
    lengths = sorted({one.max_length for one in some})
    sides = sorted({one.truncation_side for one in some})
    taken = (max_length or lengths[-1], truncation_side or sides[0])
    told = []
    if max_length is None and len(lengths) > 1:
        told.append(
            f"the adapters were trained with --max_length {', '.join(map(str, lengths))}; all are judged with "
            f"{taken[0]}, which --max_length changes"
        )
    if truncation_side is None and len(sides) > 1:
        told.append(
            f"the adapters were trained with --truncation_side {' and '.join(sides)}; all are judged with {taken[1]}, "
            "which --truncation_side changes"
        )
    return Cut(*taken, told)


@dataclass(frozen=True)
class AdapterEvaluator:
    """What evaluates any adapter on the rows of `dataset`: a dataset as train.py takes it, mini:TASK, or a .txt, whose
    text stands behind the prompt as it is. Labels are the `choices`, else the answers that occur, where they are short
    and at most 20. `columns` are for all adapters, over each one's own, which count as far as the dataset has them. The
    bare base (whose prompt is None) is asked as `like`, in its template and with its columns."""

    engine: Engine
    generator: Generator | None
    tokenizer: Any
    dataset: str
    cut: Cut
    batch_size: int
    choices: Sequence[str] | None
    like: LoadedAdapter
    columns: Mapping[str, str] = field(default_factory=dict)
    split: str | None = None  # of the dataset, as --eval_split names it

    def __call__(self, tuned: LoadedAdapter) -> AdapterResult:
        """Raises DataError as of `rows.load_rows` and `data.tokenize`, or where no row's answer is among the choices;
        ConfigError for choices that are none, or that stand beside a plain text."""
        like = self.like if tuned.prompt is None else tuned
        template, length = like.template, self.cut.max_length
        if self.dataset.lower().endswith(".txt"):
            if self.choices is not None:
                raise ConfigError(f"--choices needs rows with answers, and {self.dataset} is a plain text")
            examples = passages(self.dataset, self.tokenizer, length)
            evaluator, n = Evaluator(self.engine, None, self.tokenizer, examples, self.batch_size), len(examples)
            data = Tokenized(examples, list(range(n)), [0] * n, n, 0, 0, 0)
            return AdapterResult(tuned, template, data, [], [], evaluator(tuned.prompt))
        read = self._rows(like)
        data = tokenize(read, self.tokenizer, template, length, self.cut.truncation_side)
        rows = [read[number] for number in data.kept]
        evaluator = Evaluator(self.engine, self.generator, self.tokenizer, data.examples, self.batch_size, data.missing)
        answers = [template.own_answer(row) for row in rows]
        expected = [answer.strip() for answer in answers]
        labels = self._labels(data, answers)
        told = [self._told(data), *([evaluator.told] if evaluator.told else [])]
        judged = AdapterResult(tuned, template, data, rows, expected, evaluator(tuned.prompt), told)
        if not labels:
            return judged
        each = scores(self.engine, self.tokenizer, judged.member, list(labels.values()))
        return replace(judged, verdicts=[choice_result(one, list(labels)) for one in each])

    def together(self, members: Sequence[AdapterResult], voting: Voting | None) -> AdapterResult:
        """The members' ensemble. Its loss is that of the mean of their likelihoods, row by row.

        Raises:
            ConfigError: members whose templates leave different rows.
        """
        first = members[0]
        kept = [[(row, cut > 0) for row, cut in zip(one.data.kept, one.data.missing, strict=True)] for one in members]
        if any(one != kept[0] for one in kept):
            raise ConfigError(
                f"--ensemble: at --max_length {self.cut.max_length} the adapters' templates keep different answers of "
                f"{self.dataset}; give a larger one"
            )
        evaluation = joint_evaluation(
            self.engine, self.tokenizer, [one.member for one in members], voting or "majority_vote"
        )
        verdicts = None
        if first.verdicts is not None:
            each = zip(*(one.verdicts or () for one in members), strict=True)
            verdicts = [joint_verdict(some, voting or "mean_likelihood") for some in each]
        return replace(first, evaluation=evaluation, verdicts=verdicts)

    def _labels(self, data: Tokenized, answers: Sequence[str]) -> dict[str, str]:
        """The labels as they are shown, and as the rows have them, with the space that may stand before or behind; none
        where the rows are no classification. `answers` are the rows' own."""
        texts: dict[str, str] = {}
        for answer in answers:
            texts.setdefault(answer.strip(), answer)
        if self.choices is not None:
            check_choices(self.choices)
            if not set(texts) & set(self.choices):
                raise DataError(
                    f"--choices {','.join(self.choices)}: no row of {self.dataset} has one of them for its answer; the "
                    f"first has {next(iter(texts))!r:.80}"
                )
            return {choice: texts.get(choice, choice) for choice in self.choices}
        short = are_short(data.examples, data.missing)
        return texts if short and 2 <= len(texts) <= MOST_LABELS and all(texts) else {}

    def _rows(self, like: LoadedAdapter) -> list[Row]:
        task = self.dataset.removeprefix("mini:")
        if task != self.dataset:
            made = enumerate(mini.rows(task, "eval"), start=1)
            return [check_fields(f"{self.dataset}, row {number}", row, like.template) for number, row in made]
        return load_rows(
            self.dataset, like.template, self.columns, usual_columns=like.columns, split=self.split, flag="--eval_split"
        )

    def _told(self, data: Tokenized) -> str:
        cut, n = self.cut, len(data.examples)
        rows = data.described(f"{n:,}{f' of {data.rows:,}' if n < data.rows else ''} rows")
        return f"{self.dataset} at --max_length {cut.max_length} --truncation_side {cut.truncation_side}: {rows}"


def report(found: Mapping[str, AdapterResult], told: Sequence[str] = ()) -> str:
    """Adapters as columns, figures that some have as rows, then what is to be known of the rows, and each adapter's
    confusion. `told` is what is to be known besides."""
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
    if said := [*_told_of_rows(found), *told]:
        shown.append("\n".join(said))
    shown += [f"{name}:\n{one.confusion}" for name, one in found.items() if one.confusion]
    return "\n\n".join([*shown, *_told_of_others(next(iter(found.values())))])


def _told_of_rows(found: Mapping[str, AdapterResult]) -> list[str]:
    """Once where it is the same of all adapters, else with the adapter's name."""
    different = {tuple(one.told) for one in found.values()}
    if len(different) == 1:
        return list(different.pop())
    return [f"{name}: {sentence}" for name, one in found.items() for sentence in one.told]


def _told_of_others(one: AdapterResult) -> list[str]:
    """Rows with an answer that is none of the choices."""
    if not one.verdicts:
        return []
    others = [answer for answer in one.expected if answer not in one.verdicts[0].probabilities]
    told = f"{len(others):,} of {len(one.expected):,} rows have an answer that is none of the choices"
    return [f"{told}, the first {others[0]!r:.80}; they count as wrong"] if others else []
