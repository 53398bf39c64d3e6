"""Distillation in a training run: the questions, the base's answers with the whole text before them, and the engine
that learns from them.

1. `load_questions` reads and tokenizes the questions, without the text and with it.
2. `answered` lets the base answer them with the text, and returns rows like those of any run.
3. `distilled` records what the base predicts with the text at each token of these answers, and returns the engine and
   the evaluator, for which the label of a target is the number of its prediction.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softprompt.config.loader import TrainConfig
from softprompt.data.build_data import Rows, make_template
from softprompt.data.chat_template import never_written
from softprompt.data.dataloader import ListLoader
from softprompt.data.examples import IGNORE, Example, Examples, IndexedExamples
from softprompt.data.questions import (
    put_text_before,
    read_distilled_text,
    read_questions,
    shared_prefix,
    with_answer,
    with_text_ids,
)
from softprompt.data.row_store import Row
from softprompt.data.template import Template
from softprompt.data.tokenization import Tokenized, no_targets_error
from softprompt.engines.checked_engine import CheckedEngine
from softprompt.engines.distillation import TeacherTable, distilling, record_teacher
from softprompt.engines.factory import engine_for_inference
from softprompt.engines.microbatch_engine import MicrobatchEngine
from softprompt.evaluation.distillation import DistillationEvaluator, TextPrompt
from softprompt.generation.generator import Generator, make_generator
from softprompt.models.capabilities import check_positions, check_token_ids, max_positions, why_not_generate
from softprompt.models.loading import load_tokenizer
from softprompt.models.precision import resolve_device, resolve_dtype
from softprompt.prompt.soft_prompt import InputEmbeddings
from softprompt.training.console import print_answer_end, print_data, print_rows
from softprompt.training.resume import StartingPoint
from softprompt.training.setup import FIRST_ROWS, Base, RunData, path_of_base
from softprompt.training.teacher_answers import Answer, Teacher, answer_questions
from softprompt.utils.errors import ConfigError, ModelError
from softprompt.utils.progress import rows_bar
from softprompt.utils.tokenizer_fingerprint import tokenizer_fingerprints
from softprompt.utils.translation import translate


class QuestionIds(NamedTuple):
    """Questions as token ids: without the text, with the whole text, and with the text cut to P tokens before them."""

    plain: list[list[int]]
    with_text: list[list[int]]
    with_cut_text: list[list[int]]


@dataclass(frozen=True)
class Questions:
    """The questions of a run, tokenized.

    Attributes:
        rows: The questions as rows; the base answers them.
        train, held_out: The same as token ids; `held_out` is None if there are none.
        text_ids: The token ids of the text.
        end: The token that the template writes after an answer; None if it writes none.
        fingerprints: Hashes of the contents of the questions, the text and the tokenizer, by name.
    """

    tokenizer: Any
    template: Template
    rows: Rows
    train: QuestionIds
    held_out: QuestionIds | None
    text_ids: list[int]
    end: str | None
    fingerprints: Mapping[str, str]


def load_questions(config: TrainConfig) -> Questions:
    """Read and tokenize the text and the questions.

    Raises:
        DataError: The text or the questions cannot be read or are empty, or the chat template has no place for the
            text.
        ConfigError: The text has fewer tokens than the prompt.
        ModelError: The base has no usable tokenizer.
    """
    source, template = str(config.distillation.distill_prompt), make_template(config)
    text, rows = read_distilled_text(source), read_questions(config, template)
    print_rows(config, rows.train[0], len(rows.train), rows.notices)
    tokenizer = load_tokenizer(path_of_base(config))
    P = config.prompt.num_virtual_tokens
    train, text_ids = _tokenized(rows.train, text, tokenizer, template, P)
    held_out = _tokenized(rows.held_out, text, tokenizer, template, P)[0] if rows.held_out else None
    if P is not None and len(text_ids) < P:
        raise ConfigError(
            f"--distill_prompt {source}: its text has {len(text_ids)} tokens, fewer than the {P} virtual tokens that "
            "are to replace it; give a smaller --num_virtual_tokens"
        )
    end = template.end(with_answer(rows.train[0], "a"), tokenizer)
    print_answer_end(end, tokenizer)
    about = {"distilled text": hashlib.sha256(text.encode()).hexdigest(), **tokenizer_fingerprints(tokenizer)}
    return Questions(
        tokenizer, template.of_rows(rows.train), rows, train, held_out, text_ids, end, {**rows.fingerprints, **about}
    )


def _tokenized(
    rows: Sequence[Row], text: str, tokenizer: Any, template: Template, P: int | None
) -> tuple[QuestionIds, list[int]]:
    """Return the questions as token ids, and the token ids of the text."""
    plain, with_text, ids = put_text_before(rows, text, tokenizer, template)
    cut = ids[:P]
    with_cut = with_text_ids(rows, plain, cut, tokenizer.decode(cut).strip(), tokenizer, template)
    return QuestionIds(plain, with_text, with_cut), ids


def with_text_of_start(start: StartingPoint, questions: Questions) -> StartingPoint:
    """Return the starting point with --prompt_tuning_init_text, if TEXT is chosen without a text, set to the beginning
    of the text that is distilled, so that files and messages name it."""
    prompt = start.config.prompt
    if prompt.prompt_tuning_init != "TEXT" or prompt.prompt_tuning_init_text or prompt.init_adapter:
        return start
    text = _beginning(questions.text_ids, prompt.num_virtual_tokens or len(questions.text_ids), questions.tokenizer)
    return replace(start, config=replace(start.config, prompt=replace(prompt, prompt_tuning_init_text=text)))


def _beginning(ids: list[int], count: int, tokenizer: Any) -> str:
    """Return the shortest text that begins with the first `count` token ids; it has more if a character has several."""
    for end in range(count, len(ids) + 1):
        text = tokenizer.decode(ids[:end])
        if tokenizer(text, add_special_tokens=False)["input_ids"][:count] == ids[:count]:
            return text
    return tokenizer.decode(ids)


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


def answered(config: TrainConfig, questions: Questions, base: Base, rows_per_step: int) -> Answered:
    """Let the base answer the questions with the text before them.

    Raises:
        ModelError: The base cannot generate answers.
        ConfigError: The text and a question leave no room for an answer, or a token of the text has no embedding.
        DataError: No question fits into --max_length.
        TrainingError: A single question does not fit in memory.
    """
    model, source = base.model, f"--distill_prompt {config.distillation.distill_prompt}"
    check_token_ids(questions.text_ids, model, source)
    both = [*questions.train.with_text, *(questions.held_out.with_text if questions.held_out else [])]
    check_positions(max_positions(model), 0, max(map(len, both)) + 1, source, "shorten the text")
    device = resolve_device(config.model.device)
    dtype = resolve_dtype(device, config.model.bf16, config.model.fp16)
    engine = engine_for_inference(config.model.engine, model, questions.tokenizer, dtype)
    generator = make_generator(engine, model, questions.tokenizer, config.model.engine)
    if generator is None:
        raise ModelError(f"{source}: the base has to answer the questions, and {why_not_generate(model)}")
    begins = shared_prefix(both)
    prefix = both[0][:begins]
    text = InputEmbeddings(model)[torch.tensor(prefix, dtype=torch.int64, device=device)].float()
    end = _end_id(questions)
    ends = sorted({end, questions.tokenizer.eos_token_id})
    identity = [dict(base.fingerprint), str(dtype), questions.fingerprints.get("distilled text")]
    teacher = Teacher(generator, text if begins else None, prefix, ends, max_positions(model), identity)

    def of(ids: QuestionIds, samples: int, title: str) -> AnsweredRows:
        behind = [row[begins:] for row in ids.with_text]
        answers = answer_questions(teacher, behind, samples, config.distillation, config.training.seed, title)
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
