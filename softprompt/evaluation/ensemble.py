"""Evaluate an ensemble of prompts on held-out rows: the loss of the mean likelihood, and the answers that are voted
for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from softprompt.config.infer_args import Voting
from softprompt.data.dataset import Row
from softprompt.data.template import Template
from softprompt.data.tokenization import Example, count_targets
from softprompt.engines.base import LossEngine
from softprompt.evaluation.evaluator import Evaluation, compare_answers
from softprompt.evaluation.rows import question_ids
from softprompt.generation.likelihood import answer_examples, log_likelihoods
from softprompt.generation.voting import vote_answer


@dataclass(frozen=True)
class EnsembleMember:
    """A prompt of an ensemble, with the rows and its answers to them.

    Attributes:
        prompt: [P, H]; None is the bare base.
        rows: The rows as texts.
        examples: The rows tokenized with this member's template.
        answers: This member's answers to the rows; None if answers are not compared.
        missing: For each row, how many tokens of its answer were truncated, as in `data.Tokenized`.
    """

    prompt: Tensor | None
    template: Template
    rows: Sequence[Row]
    examples: Sequence[Example]
    answers: Sequence[str] | None
    missing: Sequence[int] = ()


def evaluate_ensemble(
    engine: LossEngine, tokenizer: Any, members: Sequence[EnsembleMember], voting: Voting = "majority_vote"
) -> Evaluation:
    """Evaluate members that have the same rows and expected answers.

    The ensemble's likelihood of a row is the mean of its members' likelihoods; the loss is -log of it, summed over the
    rows and divided by the number of targets. Its answer to a row is the one that `voting.vote_answer` chooses.
    """
    examples = members[0].examples
    of_members = [engine.row_losses(member.prompt, member.examples) for member in members]  # [members][rows]
    losses = [-_log_mean_exp([-loss for loss in of_row]) for of_row in zip(*of_members, strict=True)]
    targets, answers = list(map(count_targets, examples)), [member.answers for member in members]
    if any(texts is None for texts in answers):
        return Evaluation(losses, targets)
    voted = [
        vote_answer(texts, voting, partial(_score_row, engine, tokenizer, members, row))
        for row, texts in enumerate(zip(*(a for a in answers if a is not None), strict=True))
    ]
    return Evaluation(losses, targets, voted, compare_answers(voted, examples, members[0].missing, tokenizer))


def _score_row(
    engine: LossEngine, tokenizer: Any, members: Sequence[EnsembleMember], row: int, answers: Sequence[str]
) -> list[list[float]]:
    """Return each member's log-likelihoods of the answers to one row: [members][answers]."""
    questions = [question_ids(member.examples[row]) for member in members]
    rows, templates = [member.rows[row] for member in members], [member.template for member in members]
    examples = answer_examples(questions, rows, answers, templates, tokenizer)
    return log_likelihoods(engine, [member.prompt for member in members], examples)


def _log_mean_exp(values: Sequence[float]) -> float:
    """Return log(mean(exp(values))). The largest value is subtracted first, so that not all exponentials underflow."""
    largest = max(values)
    return largest + math.log(sum(math.exp(value - largest) for value in values) / len(values))
