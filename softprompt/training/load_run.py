"""Load what a run trains and trains on: rows, base and prompt. With distillation, the base answers its questions."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from softprompt.config.loader import TrainConfig
from softprompt.config.value_parsers import parse_duration
from softprompt.distributed.process_group import World
from softprompt.models.capabilities import RowMaxima, check_rows_fit, check_token_ids
from softprompt.models.loading import load_tokenizer
from softprompt.prompt.soft_prompt import PromptEmbedding
from softprompt.training.answered_questions import Answered, answered
from softprompt.training.engine_setup import check_engine
from softprompt.training.prompt_setup import check_data_fits, start_prompt, with_defaults_of_base
from softprompt.training.question_setup import (
    check_text_length,
    load_questions,
    load_text,
    make_teacher,
    with_text_of_start,
    write_questions,
)
from softprompt.training.resume import StartingPoint, compare_contents, starting_point
from softprompt.training.setup import (
    Base,
    RunData,
    check_places,
    freeze_base,
    load_data,
    load_run_base,
    path_of_base,
    shard_base,
)
from softprompt.training.stop_signals import StopRequest
from softprompt.training.teacher_answers import AnswerSource, kept_answers
from softprompt.utils.errors import ConfigError


class Loaded(NamedTuple):
    """What a rank loads before an engine is chosen; `training.setup` describes the parts."""

    start: StartingPoint
    output_dir: Path
    data: RunData
    base: Base
    prompt: PromptEmbedding
    answers: Answered | None = None  # with distillation


def load_run(
    config: TrainConfig,
    world: World,
    check: Callable[[TrainConfig, Path], None] | None = None,
    began: float | None = None,
) -> Loaded:
    """Load and check the rows, the base and the prompt of a run. Every rank does this by itself; nothing is written.
    `began` is the `time.monotonic()` at which the run began. If it is None, --max_time does not end the answering of
    questions (--dry_run).

    Raises:
        SoftpromptError: The settings, the data, the base or the output folder prevent the run.
    """
    start = starting_point(config, world.size)
    output_dir = check_places(start, world, check)
    if start.config.distillation.text:
        return _load_distillation(start, output_dir, world, began)
    data = load_data(start.config, start.rows_per_step)
    base = load_run_base(start.config, world)
    start = compare_contents(start, {**data.fingerprints, **base.fingerprint})
    start = with_defaults_of_base(start, base.model)
    base = shard_base(start.config, freeze_base(start.config, base), world)
    prompt = start_prompt(start, data.tokenizer, base.model)
    check_data_fits(start.config, data, base.model, len(prompt.weight))
    return Loaded(start, output_dir, data, base, prompt)


def _load_distillation(start: StartingPoint, output_dir: Path, world: World, began: float | None) -> Loaded:
    """Load a run that distills a text: the base itself answers the questions before the first step. This takes a long
    time, so everything that does not depend on the answers is checked first."""
    if world.size > 1:
        raise ConfigError(f"{start.config.distillation.flag} is for a single process; start one without torchrun")
    tokenizer = load_tokenizer(path_of_base(start.config))
    text = load_text(start.config, tokenizer)
    questions = load_questions(start.config, text, tokenizer) if start.config.data.dataset else None
    base = freeze_base(start.config, load_run_base(start.config, world))
    _check_same_contents(start, {**(questions or text).fingerprints, **base.fingerprint})
    check_token_ids(text.ids, base.model, start.config.distillation.flag)
    start = with_defaults_of_base(with_text_of_start(start, text, tokenizer), base.model)
    # Another base, which --ignore_data_skip allows, answers the questions itself.
    is_same_base = start.fingerprints.get("base") in (None, base.fingerprint.get("base"))
    kept = kept_answers(start.checkpoint, start.checkpoint.parent) if start.checkpoint and is_same_base else {}
    stop = None if began is None else StopRequest(time_limit(start.config), began)
    source = AnswerSource(make_teacher(start.config, base, tokenizer), kept, stop)
    prompt = start_prompt(start, tokenizer, base.model)
    P = len(prompt.weight)
    check_text_length(text.ids, P, start.config)
    check_rows_fit(base.model, P, start.config.data.max_length, RowMaxima(1, 0))
    check_engine(start.config, base, tokenizer, prompt, text.ids)
    if questions is None:
        written = write_questions(start.config, base, tokenizer, text, source)
        questions = load_questions(start.config, text, tokenizer, written)
        _check_same_contents(start, {**questions.fingerprints, **base.fingerprint})
    known = answered(start.config, questions, base, source, start.rows_per_step, P)
    start = compare_contents(start, {**known.data.fingerprints, **base.fingerprint})
    check_data_fits(start.config, known.data, base.model, P)
    return Loaded(start, output_dir, known.data, base, prompt, known)


def _check_same_contents(start: StartingPoint, fingerprints: Mapping[str, str]) -> None:
    """Raise CheckpointError if the fingerprints differ from the checkpoint's, unless --ignore_data_skip is given."""
    if not start.config.training.ignore_data_skip:
        compare_contents(start, fingerprints)


def time_limit(config: TrainConfig) -> float | None:
    """Return --max_time in seconds."""
    return parse_duration(config.training.max_time) if config.training.max_time else None
