"""Distillation in a training run: rows with the base's own answers, and the engine that learns from its predictions.

1. `question_setup` reads the questions, or lets the base write them, and tokenizes them without and with the text.
2. `answered` lets the base answer them with the text, and returns rows like those of any run.
3. `distilled` records what the base predicts with the text at each token of these answers, and returns the engine and
   the evaluator, for which the label of a target is the number of its prediction.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softprompt.config.loader import TrainConfig
from softprompt.data.chat_template import never_written
from softprompt.data.dataloader import ListLoader
from softprompt.data.examples import IGNORE, Example, Examples, IndexedExamples
from softprompt.data.questions import shared_prefix, with_answer
from softprompt.data.tokenization import Tokenized, no_targets_error
from softprompt.engines.checked_engine import CheckedEngine
from softprompt.engines.distillation import TeacherTable, distilling, record_teacher
from softprompt.engines.factory import engine_for_inference
from softprompt.engines.microbatch_engine import MicrobatchEngine
from softprompt.evaluation.distillation import DistillationEvaluator, TextPrompt
from softprompt.generation.generator import Generator
from softprompt.models.capabilities import check_positions, check_token_ids, max_positions
from softprompt.models.loading import word_embeddings
from softprompt.prompt.soft_prompt import InputEmbeddings
from softprompt.training.console import print_data
from softprompt.training.question_setup import QuestionIds, Questions, identity_of
from softprompt.training.setup import FIRST_ROWS, Base, RunData
from softprompt.training.teacher_answers import Answer, Teacher, answer_questions
from softprompt.utils.progress import rows_bar
from softprompt.utils.translation import translate


class AnsweredRows(NamedTuple):
    """Answered questions: the same answers behind three kinds of questions (see `QuestionIds`). `with_text` lacks the
    tokens with which all questions with the text begin."""

    plain: Tokenized
    with_text: Examples
    with_cut_text: Examples


@dataclass(frozen=True)
class Answered:
    """The answered questions of a run.

    Attributes:
        data: The rows without the text, which are trained and evaluated on.
        train, held_out: The rows with the text, whose predictions are learned.
        text: The embeddings of the tokens with which all rows with the text begin, [P, H].
        prefix: The ids of these tokens.
        generator: Generates answers.
    """

    data: RunData
    train: AnsweredRows
    held_out: AnsweredRows | None
    text: Tensor
    prefix: list[int]
    generator: Generator


def answered(
    config: TrainConfig, questions: Questions, base: Base, generator: Generator, rows_per_step: int
) -> Answered:
    """Let the base answer the questions with the text before them.

    Raises:
        ConfigError: The text and a question leave no room for an answer, or a token of the text has no embedding.
        DataError: No question fits into --max_length.
        TrainingError: A single question does not fit in memory.
    """
    model, source = base.model, config.distillation.flag
    check_token_ids(questions.text_ids, model, source)
    both = [*questions.train.with_text, *(questions.held_out.with_text if questions.held_out else [])]
    check_positions(max_positions(model), 0, max(map(len, both)) + 1, source, "shorten the text")
    begins = shared_prefix(both)
    prefix = both[0][:begins]
    text = InputEmbeddings(model)[
        torch.tensor(prefix, dtype=torch.int64, device=word_embeddings(model).weight.device)
    ].float()
    end = _end_id(questions)
    ends = sorted({end, questions.tokenizer.eos_token_id})
    before = text if begins else None
    teacher = Teacher(generator, before, prefix, ends, max_positions(model), identity_of(config, base))

    most = config.distillation.distill_max_new_tokens

    def of(ids: QuestionIds, samples: int, title: str) -> AnsweredRows:
        behind = [row[begins:] for row in ids.with_text]
        answers = answer_questions(teacher, behind, samples, most, config.training.seed, title)
        _print_answers(answers, config, held_out=samples == 0)
        return _rows_with_answers(ids._replace(with_text=behind), answers, end, config.data.max_length)

    train = of(questions.train, config.distillation.distill_samples, "answers with the text")
    held_out = of(questions.held_out, 0, "held-out answers with the text") if questions.held_out else None
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
        {**questions.fingerprints, "answers with the text": _fingerprint(train, held_out)},
    )
    return Answered(data, train, held_out, text, prefix, generator)


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
    print(translate(told))


def _rows_with_answers(
    ids: QuestionIds, answers: Sequence[Sequence[Answer]], end: int, max_length: int
) -> AnsweredRows:
    """Append the answers to all kinds of questions. An answer is truncated where its row without the text would have
    more than `max_length` tokens; if nothing is left of it, the row is left out."""
    made: tuple[list[Example], ...] = ([], [], [])
    kept, missing, cut, number = [], [], 0, -1
    for asked, of_question in zip(zip(*ids, strict=True), answers, strict=True):
        for answer in of_question:
            number += 1
            whole = [*answer.ids, *([end] if answer.ended else [])]
            targets = whole[: max(0, max_length - len(asked[0]))]
            cut += len(targets) < len(whole)
            if targets:
                kept.append(number)
                missing.append(len(whole) - len(targets))
                for examples, question in zip(made, asked, strict=True):
                    examples.append(Example([*question, *targets], [IGNORE] * len(question) + targets))
    if not kept:
        raise no_targets_error(min(map(len, ids.plain)), max_length)
    plain, with_text, with_cut = map(Examples.from_rows, made)
    rows = number + 1
    return AnsweredRows(Tokenized(plain, kept, missing, rows, cut, rows - len(kept), 0), with_text, with_cut)


def _fingerprint(train: AnsweredRows, held_out: AnsweredRows | None) -> str:
    """Return a hash of the answers."""
    digest = hashlib.sha256()
    for rows in (train, held_out):
        if rows:
            digest.update(rows.plain.examples.input_ids.tobytes() + rows.plain.examples.first_targets.tobytes())
    return digest.hexdigest()


class Distilled(NamedTuple):
    """The engine that learns from the predictions with the text, and the evaluator of held-out questions; None without
    held-out questions."""

    engine: MicrobatchEngine[Any]
    evaluator: DistillationEvaluator | None


def distilled(config: TrainConfig, questions: Answered, base: Base, engine: MicrobatchEngine[Any]) -> Distilled:
    """Record what the base predicts with the text at each token of the answers, and return what learns from it.

    Args:
        engine: The engine that was chosen for the rows without the text.

    Raises:
        TrainingError: A single row does not fit in memory.
    """
    model, data = base.model, questions.data
    recorder = engine_for_inference(config.model.engine, model, data.tokenizer, engine.compute_dtype)
    table = _recorded(recorder, questions.text, questions.train.with_text, "predictions with the text")
    if questions.held_out is None:
        return Distilled(distilling(engine, table), None)
    title = "held-out predictions with the text"
    evaluator = DistillationEvaluator(
        engine,
        _recorded(recorder, questions.text, questions.held_out.with_text, title),
        questions.generator,
        data.tokenizer,
        IndexedExamples(questions.held_out.plain.examples),
        questions.held_out.plain.examples,
        IndexedExamples(questions.held_out.with_cut_text),
        TextPrompt(questions.prefix, questions.held_out.with_text),
        config.distillation.distill_max_new_tokens,
    )
    return Distilled(distilling(engine, table), evaluator)


def _recorded(engine: Any, text: Tensor, rows: Examples, title: str) -> TeacherTable:
    """Return the predictions of the base with the text at all targets of `rows`."""
    prompt = text if len(text) else None
    if isinstance(engine, CheckedEngine):  # the text may be longer than any prompt that was checked
        engine = engine.choose(prompt, rows)
    with rows_bar(len(rows), title) as on_rows:
        return record_teacher(engine, prompt, IndexedExamples(rows), on_rows)
