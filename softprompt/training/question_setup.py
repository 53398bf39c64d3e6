"""The questions of a distillation: read, or written by the base, and tokenized without and with the text."""

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from softprompt.config.loader import TrainConfig
from softprompt.config.validation import quantization_bits
from softprompt.data.build_data import Rows, make_template
from softprompt.data.dataset import question
from softprompt.data.questions import (
    put_text_before,
    read_distilled_text,
    read_questions,
    text_ids,
    with_answer,
    with_held_out,
    with_text_ids,
)
from softprompt.data.row_store import RowStore
from softprompt.data.template import Template
from softprompt.data.written_questions import QUESTION_TOKENS, questions_about, written_questions
from softprompt.engines.factory import engine_for_inference
from softprompt.generation.generator import Generator, make_generator
from softprompt.models.capabilities import (
    RowMaxima,
    check_rows_fit,
    check_token_ids,
    check_vocabulary,
    max_positions,
    why_not_generate,
)
from softprompt.models.precision import resolve_device, resolve_dtype
from softprompt.training.console import print_answer_end, print_rows
from softprompt.training.resume import StartingPoint
from softprompt.training.setup import Base, path_of_base
from softprompt.training.teacher_answers import AnswerSource, Teacher, answer_questions
from softprompt.utils.errors import ConfigError, DataError, ModelError
from softprompt.utils.tokenizer_fingerprint import tokenizer_fingerprints
from softprompt.utils.translation import translate

# The engine of the base with the text, as a value of --engine. It is not the run's, because a resumed run has the one
# that was chosen for its training: its predictions would then differ by rounding.
TEACHER_ENGINE = "auto"
DISTILLED_TEXT = "distilled text"  # name of the fingerprint
LEAST_WRITTEN = 0.5  # share of the requested questions; with fewer, a warning is printed
TOKENS_OF_A_CHARACTER = 32  # more than any character has, also one that is composed of several code points


class QuestionIds(NamedTuple):
    """Questions as token ids: without the text, and with it, but then without `Questions.prefix`."""

    plain: list[list[int]]
    with_text: list[list[int]]


@dataclass(frozen=True)
class Questions:
    """The questions of a run, tokenized.

    Attributes:
        rows: The questions as rows; the base answers them.
        train, held_out: The same as token ids; `held_out` is None if there are none.
        prefix: The token ids with which all questions with the text begin.
        text_ids: The token ids of the text.
        end: The token that the template writes after an answer; None if it writes none.
        fingerprints: Hashes of the contents of the questions, the text and the tokenizer, by name.
    """

    tokenizer: Any
    template: Template
    rows: Rows
    train: QuestionIds
    held_out: QuestionIds | None
    prefix: list[int]
    text_ids: list[int]
    end: str | None
    fingerprints: Mapping[str, str]

    def with_cut_text(self, P: int) -> list[list[int]]:
        """Return the held-out questions with the text cut to P tokens before them, as token ids; none without held-out
        questions."""
        if self.held_out is None:
            return []
        cut, plain = self.text_ids[:P], self.held_out.plain
        text = self.tokenizer.decode(cut).strip()
        return with_text_ids(self.rows.held_out, plain, cut, text, self.tokenizer, self.template)


def check_text_length(ids: Sequence[int], P: int, config: TrainConfig) -> None:
    """Raise ConfigError if a text, as token ids, has fewer tokens than the prompt that is to replace it."""
    if len(ids) < P:
        way = "start from a shorter prompt" if config.prompt.init_adapter else "give a smaller --num_virtual_tokens"
        raise ConfigError(
            f"{config.distillation.flag}: its text has {len(ids)} tokens, fewer than the {P} virtual tokens that are "
            f"to replace it; {way}"
        )


class DistilledText(NamedTuple):
    """The text that is distilled.

    Attributes:
        text: The text itself.
        ids: Its token ids, without special tokens.
        fingerprints: Hashes of its content and of the tokenizer, by name.
    """

    text: str
    ids: list[int]
    fingerprints: Mapping[str, str]


def load_text(config: TrainConfig, tokenizer: Any) -> DistilledText:
    """Read and tokenize the text.

    Raises:
        DataError: It cannot be read or has no tokens.
        ConfigError: It has fewer tokens than the prompt.
    """
    text = read_distilled_text(str(config.distillation.text))
    ids = text_ids(text, tokenizer)
    check_text_length(ids, config.prompt.num_virtual_tokens or 0, config)
    return DistilledText(text, ids, {DISTILLED_TEXT: _hash(text), **tokenizer_fingerprints(tokenizer)})


def load_questions(config: TrainConfig, text: DistilledText, tokenizer: Any, written: Rows | None = None) -> Questions:
    """Read and tokenize the questions.

    Args:
        written: The questions that the base has written; None reads those of --dataset.

    Raises:
        DataError: The questions cannot be read or are empty, or the chat template has no place for the text.
    """
    template = make_template(config)
    rows = written or read_questions(config, template)
    print_rows(config, rows.train[0], len(rows.train), rows.notices)
    n = len(rows.train)
    asked = chain(rows.train, rows.held_out)
    plain, prefix, with_text = put_text_before(asked, text.text, text.ids, tokenizer, template)
    end = template.end(with_answer(rows.train[0], "a"), tokenizer)
    print_answer_end(end, tokenizer)
    return Questions(
        tokenizer,
        template.of_rows(rows.train),
        rows,
        QuestionIds(plain[:n], with_text[:n]),
        QuestionIds(plain[n:], with_text[n:]) if rows.held_out else None,
        prefix,
        text.ids,
        end,
        {**rows.fingerprints, **text.fingerprints},
    )


def check_questions_fit(config: TrainConfig, questions: Questions, base: PreTrainedModel, P: int) -> None:
    """Check that P virtual tokens, a question and an answer fit into the base's positions. Questions without room for
    an answer do not count.

    Raises:
        ConfigError: The base has too few positions.
    """
    most, parts = config.data.max_length, (questions.train, questions.held_out)
    lengths = [len(ids) for part in parts if part for ids in part.plain if len(ids) < most]
    check_rows_fit(base, P, most, RowMaxima(max(lengths, default=0) + 1, 0))


def with_text_of_start(start: StartingPoint, text: DistilledText, tokenizer: Any) -> StartingPoint:
    """Return the starting point with --prompt_tuning_init_text, if TEXT is chosen without a text, set to the beginning
    of the text that is distilled, so that files and messages name it."""
    prompt = start.config.prompt
    if prompt.prompt_tuning_init != "TEXT" or prompt.prompt_tuning_init_text or prompt.init_adapter:
        return start
    beginning = _beginning(text.ids, prompt.num_virtual_tokens or len(text.ids), tokenizer)
    return replace(start, config=replace(start.config, prompt=replace(prompt, prompt_tuning_init_text=beginning)))


def _beginning(ids: list[int], count: int, tokenizer: Any) -> str:
    """Return the shortest text that begins with the first `count` token ids; it has more if a character has several.
    If no such text is found, as with a tokenizer that changes texts, the text of these token ids is returned."""
    for end in range(count, min(count + TOKENS_OF_A_CHARACTER, len(ids) + 1)):
        text = tokenizer.decode(ids[:end])
        if tokenizer(text, add_special_tokens=False)["input_ids"][:count] == ids[:count]:
            return text
    return tokenizer.decode(ids[:count])


def make_teacher(config: TrainConfig, base: Base, tokenizer: Any) -> Generator:
    """Return the generator with which the base answers the questions.

    Raises:
        ModelError: The base cannot generate answers, or its tokenizer has words for which it has no embedding.
    """
    check_vocabulary(tokenizer, base.model, path_of_base(config))
    device = resolve_device(config.model.device)
    dtype = resolve_dtype(device, config.model.bf16, config.model.fp16)
    engine = engine_for_inference(TEACHER_ENGINE, base.model, tokenizer, dtype)
    generator = make_generator(engine, base.model, tokenizer, TEACHER_ENGINE)
    if generator is None:
        raise ModelError(
            f"{config.distillation.flag}: the base has to answer the questions, and {why_not_generate(base.model)}"
        )
    return generator


def write_questions(config: TrainConfig, base: Base, tokenizer: Any, text: DistilledText, source: AnswerSource) -> Rows:
    """Let the base write questions about the passages of the text that is distilled (self-study: Eyuboglu et al. 2025,
    arXiv:2506.06266). Questions that it repeats are left out. The order is random, drawn with the seed.

    Raises:
        DataError: The template has columns that a question does not fill, or no place for the text; or the base writes
            too few questions for --eval_rows.
        ConfigError: A token has no embedding, or a passage leaves no room for a question.
        Stopped: `AnswerSource.stop` asked to stop.
    """
    template, settings, seed = make_template(config), config.distillation, config.training.seed
    first = question(f"{settings.flag}, question 1", {"prompt": "a"}, template)  # before the base writes any
    put_text_before([first], text.text, text.ids, tokenizer, template)
    asked = questions_about(text.text, text.ids, tokenizer, template, settings.distill_questions)
    check_token_ids(chain.from_iterable(asked), base.model, settings.flag)
    samples = -(-settings.distill_questions // len(asked))
    ends = sorted({tokenizer.eos_token_id, *tokenizer("\n", add_special_tokens=False)["input_ids"][-1:]})
    identity = identity_of(config, base, text.fingerprints[DISTILLED_TEXT])
    teacher = Teacher(source, None, [], ends, max_positions(base.model), identity)
    answers = answer_questions(teacher, asked, samples, QUESTION_TOKENS, seed, "questions about the text")
    found = written_questions([answer.ids for each in zip(*answers, strict=True) for answer in each], tokenizer)
    random.Random(seed).shuffle(found)  # so that training and held-out questions are about all parts of the text
    found = found[: settings.distill_questions]
    print(translate(f"the base wrote {len(found):,} of the {settings.distill_questions:,} requested questions"))
    if len(found) < LEAST_WRITTEN * settings.distill_questions:
        print(translate("warning: so few questions teach little about the document; give your own with --dataset"))
    rows = RowStore(question(f"question {n}", {"prompt": each}, template) for n, each in enumerate(found, start=1))
    if not rows:
        raise DataError(f"{settings.flag}: the base writes no question about it; give questions with --dataset")
    return with_held_out(config, template, rows, [])


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def identity_of(config: TrainConfig, base: Base, text: str) -> list[Any]:
    """Return what the answers of a base depend on besides the requests, in JSON types. The hash `text` of the text that
    is distilled is part of it, so that each text has a cache of its own."""
    model, device = config.model, resolve_device(config.model.device)
    bits = quantization_bits(model.load_in_8bit, model.load_in_4bit)
    dtype = str(resolve_dtype(device, model.bf16, model.fp16))
    return [dict(base.fingerprint), dtype, bits, text]
