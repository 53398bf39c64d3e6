"""The rows of a distillation: questions with the base's own answers, which are generated with the text before them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.config.loader import TrainConfig
from softprompt.data.chat_template import never_written
from softprompt.data.dataloader import ListLoader
from softprompt.data.examples import IGNORE, Example, Examples, IndexedExamples
from softprompt.data.questions import with_answer
from softprompt.data.tokenization import Tokenized
from softprompt.models.capabilities import check_positions, check_token_ids, max_positions
from softprompt.models.loading import word_embeddings
from softprompt.prompt.soft_prompt import InputEmbeddings
from softprompt.runs.state import Metrics
from softprompt.training.console import print_data
from softprompt.training.question_setup import (
    DISTILLED_TEXT,
    QuestionIds,
    Questions,
    check_questions_fit,
    identity_of,
)
from softprompt.training.resume import HELD_OUT_ANSWERS, TRAIN_ANSWERS
from softprompt.training.setup import FIRST_ROWS, Base, RunData
from softprompt.training.teacher_answers import Answer, AnswerSource, Teacher, answer_questions
from softprompt.utils.errors import DataError
from softprompt.utils.model_config import text_config
from softprompt.utils.translation import translate


class AnsweredRows(NamedTuple):
    """Answered questions: the same answers behind both kinds of questions; see `QuestionIds`."""

    plain: Tokenized
    with_text: Examples


@dataclass(frozen=True)
class Answered:
    """The answered questions of a run.

    Attributes:
        questions: The questions alone.
        data: The rows without the text, which are trained and evaluated on.
        train, held_out: The same answers without and with the text; `held_out` is None without held-out questions.
        with_cut_text: The held-out questions with the text cut to P tokens before them, as token ids.
        teacher: What has answered the questions.
        metrics: `answers`, the number of answers; `answers_not_ended`, the number of those that reached the token limit
            before an end token.
    """

    questions: Questions
    data: RunData
    train: AnsweredRows
    held_out: AnsweredRows | None
    with_cut_text: list[list[int]]
    teacher: Teacher
    metrics: Metrics


def answered(
    config: TrainConfig,
    questions: Questions,
    base: Base,
    source: AnswerSource,
    rows_per_step: int,
    P: int,
) -> Answered:
    """Let the base answer the questions with the text before them.

    Args:
        rows_per_step: Number of rows of an optimizer step.
        P: Number of virtual tokens of the prompt that is trained on the answers.

    Raises:
        ConfigError: The base has too few positions for the text (or P virtual tokens), a question and an answer; or a
            token has no embedding.
        DataError: No question fits into --max_length, or the chat template has no place for the cut text.
        Stopped: `AnswerSource.stop` asked to stop.
        TrainingError: A single question does not fit in memory.
    """
    _check_text(config, questions, base.model)
    check_questions_fit(config, questions, base.model, P)
    with_cut_text = questions.with_cut_text(P)
    end, most = _end_id(questions), config.distillation.distill_max_new_tokens
    ends = sorted({end, questions.tokenizer.eos_token_id})
    text = _embeddings(base.model, questions.prefix) if questions.prefix else None
    identity = identity_of(config, base, questions.fingerprints[DISTILLED_TEXT])
    teacher = Teacher(source, text, questions.prefix, ends, max_positions(base.model), identity)

    counts: Metrics = {"answers": 0, "answers_not_ended": 0}

    room = _with_room(questions.train, config)
    held_out_room = _with_room(questions.held_out, config, held_out=True) if questions.held_out else []

    def of(ids: QuestionIds, asked: list[list[int] | None], samples: int, title: str) -> AnsweredRows:
        answers = answer_questions(teacher, asked, samples, most, config.training.seed, title)
        _print_answers(answers, config, held_out=samples == 0)
        counts["answers"] += sum(map(len, answers))
        counts["answers_not_ended"] += sum(not answer.ended for each in answers for answer in each)
        return _rows_with_answers(ids, answers, end, config)

    train, held_out = of(questions.train, room, config.distillation.distill_samples, "answers with the text"), None
    if questions.held_out:
        held_out = of(questions.held_out, held_out_room, 0, "held-out answers with the text")
    print_data(train.plain, held_out.plain if held_out else None, None, {})
    seen = questions.rows.seen
    data = RunData(
        questions.tokenizer,
        questions.template,
        train.plain,
        held_out.plain if held_out else None,
        questions.rows.held_out,
        [seen[number] for number in held_out.plain.kept] if held_out else [],
        ListLoader(IndexedExamples(train.plain.examples), config.training, rows_per_step),
        [with_answer(row, "") for row in questions.rows.train[:FIRST_ROWS]],
        questions.end,
        False,
        {**questions.fingerprints, TRAIN_ANSWERS: _fingerprint(train), HELD_OUT_ANSWERS: _fingerprint(held_out)},
    )
    return Answered(questions, data, train, held_out, with_cut_text, teacher, counts)


def _with_room(ids: QuestionIds, config: TrainConfig, held_out: bool = False) -> list[list[int] | None]:
    """Return the questions with the text; None for one that leaves no room for an answer. Raises DataError if no
    question leaves room."""
    most, asked = config.data.max_length, list[list[int] | None](ids.with_text)
    too_long = [number for number, row in enumerate(ids.plain) if len(row) >= most]
    if len(too_long) == len(asked):
        shortest = min(map(len, ids.plain))
        enough = shortest + config.distillation.distill_max_new_tokens
        told = f"no question leaves room for an answer at --max_length {most}"
        if held_out:
            told = f"no held-out question leaves room for an answer at --max_length {most}"
        raise DataError(f"{told}: the shortest one has {shortest} tokens; give --max_length {enough} or more")
    for number in too_long:
        asked[number] = None
    if too_long:
        n, first = len(too_long), too_long[0] + 1
        told = f"warning: {n:,} questions leave no room for an answer at --max_length {most}; the first: {first:,}"
        if held_out:
            told = (
                f"warning: {n:,} held-out questions leave no room for an answer at --max_length {most}; the first: "
                f"{first:,}"
            )
        print(translate(told))
    return asked


def _embeddings(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """Return the embeddings of n tokens, [n, H] fp32 on the device of the base."""
    return InputEmbeddings(model)[torch.tensor(ids, device=word_embeddings(model).weight.device)].float()


def _check_text(config: TrainConfig, questions: Questions, model: PreTrainedModel) -> None:
    """Check that the base can read the text and the questions, and warn if together they are longer than the rows that
    the base was trained on: a base whose positions are not in a table computes them all the same.

    Raises:
        ConfigError: See `answered`.
    """
    source, positions = config.distillation.flag, max_positions(model)
    parts = [questions.train, *([questions.held_out] if questions.held_out else [])]
    check_token_ids(chain.from_iterable(row for part in parts for row in part.with_text), model, "a question")
    most = config.data.max_length  # a longer question gets no answer
    rows = [whole for part in parts for row, whole in zip(*part, strict=True) if len(row) < most]
    if not rows:
        return  # see `_with_room`
    longest = len(questions.prefix) + max(map(len, rows))
    check_positions(positions, 0, longest + 1, source, "shorten the text, or the longest question")
    longest += config.distillation.distill_max_new_tokens
    known = getattr(text_config(model.config), "max_position_embeddings", None)
    if known and positions is None and longest > known:
        print(
            f"warning: {source}: with the text, a question and an answer have up to {longest:,} tokens, more than the "
            f"{known:,} positions that the base was trained on; the answers may be poor: shorten the text"
        )


def _end_id(questions: Questions) -> int:
    tokenizer, end = questions.tokenizer, questions.end
    learned = tokenizer.eos_token if end is None or end in never_written(tokenizer) else end
    return tokenizer.convert_tokens_to_ids(learned)


def _print_answers(answers: Sequence[Sequence[Answer]], config: TrainConfig, held_out: bool) -> None:
    every = [answer for each in answers for answer in each]
    tokens, endless = sum(len(answer.ids) for answer in every), sum(not answer.ended for answer in every)
    n, asked = len(every), len(answers)
    told = f"{n:,} answers with the text to {asked:,} questions: {tokens:,} tokens"
    if held_out:
        told = f"{n:,} held-out answers with the text to {asked:,} questions: {tokens:,} tokens"
    if endless:
        most = config.distillation.distill_max_new_tokens
        told += f"; {endless:,} of them do not end within --distill_max_new_tokens {most}"
        if any(not answer.ended and len(answer.ids) < most for answer in every):
            told += " or the base's positions"
    print(translate(told))


def _rows_with_answers(
    ids: QuestionIds, answers: Sequence[Sequence[Answer]], end: int, config: TrainConfig
) -> AnsweredRows:
    """Append the answers to both kinds of questions; `Tokenized.kept` holds the numbers of the questions. An answer is
    truncated where its row without the text would have more than --max_length tokens."""
    made: tuple[list[Example], ...] = ([], [])
    kept, missing, cut = [], [], 0
    for number, (asked, of_question) in enumerate(zip(zip(*ids, strict=True), answers, strict=True)):
        for answer in of_question:
            whole = [*answer.ids, *([end] if answer.ended else [])]
            targets = whole[: config.data.max_length - len(asked[0])]
            cut += len(targets) < len(whole)
            kept.append(number)
            missing.append(len(whole) - len(targets))
            for examples, question in zip(made, asked, strict=True):
                examples.append(question_with_answer(question, targets))
    plain, with_text = map(Examples.from_rows, made)
    return AnsweredRows(Tokenized(plain, kept, missing, len(kept), cut, 0, 0), with_text)


def question_with_answer(question: list[int], answer: list[int]) -> Example:
    """Return a row whose targets are the tokens of the answer."""
    return Example([*question, *answer], [IGNORE] * len(question) + answer)


def _fingerprint(rows: AnsweredRows | None) -> str:
    """Return a hash of answered questions, or of none."""
    digest = hashlib.sha256()
    if rows:
        digest.update(rows.plain.examples.input_ids.tobytes() + rows.plain.examples.first_targets.tobytes())
    return digest.hexdigest()
