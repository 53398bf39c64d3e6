"""What the prompts of an ensemble make of held-out rows together."""

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
from softprompt.engines.base import Engine
from softprompt.evaluation.evaluator import Evaluation, compared, question_ids
from softprompt.generation.likelihood import answer_examples, log_likelihoods
from softprompt.generation.voting import majority


@dataclass(frozen=True)
class Member:
    """A prompt [P, H] (None: the bare base), the rows, the examples that its template makes of them, its answers to
    them, which are absent where answers are not compared, and what is `missing` of the expected ones, as of
    `data.Tokenized`."""

    prompt: Tensor | None
    template: Template
    rows: Sequence[Row]
    examples: Sequence[Example]
    answers: Sequence[str] | None
    missing: Sequence[int] = ()


def joint_evaluation(
    engine: Engine, tokenizer: Any, members: Sequence[Member], voting: Voting = "majority_vote"
) -> Evaluation:
    """The loss of the mean of the members' likelihoods, row by row, and the answers that they elect as of
    `ensemble.majority`. The rows and their answers must be the same for each member."""
    examples = members[0].examples
    of_rows = [engine.row_losses(one.prompt, one.examples) for one in members]  # [k][rows]
    total = sum(-_log_mean([-loss for loss in losses]) for losses in zip(*of_rows, strict=True))
    loss, given = total / sum(map(count_targets, examples)), [one.answers for one in members]
    if any(answers is None for answers in given):
        return Evaluation(loss, None, None)
    answers = [
        majority(texts, voting, partial(_of_members, engine, tokenizer, members, row))
        for row, texts in enumerate(zip(*(a for a in given if a is not None), strict=True))
    ]
    return compared(loss, answers, examples, members[0].missing, tokenizer)


def scores(
    engine: Engine, tokenizer: Any, member: Member, answers: Sequence[str], rows: slice = slice(None)
) -> list[list[float]]:
    """The log-likelihood of each of the answers behind each of the rows."""
    texts = [question_ids(e) for e in member.examples[rows]]
    behind = answer_examples(texts, member.rows[rows], answers, [member.template] * len(texts), tokenizer)
    return log_likelihoods(engine, [member.prompt] * len(texts), behind)


def _of_members(
    engine: Engine, tokenizer: Any, members: Sequence[Member], row: int, answers: Sequence[str]
) -> list[list[float]]:
    return [scores(engine, tokenizer, one, answers, slice(row, row + 1))[0] for one in members]


def _log_mean(values: Sequence[float]) -> float:
    """log of the mean of numbers whose logs these are."""
    most = max(values)
    return most + math.log(sum(math.exp(value - most) for value in values) / len(values))
