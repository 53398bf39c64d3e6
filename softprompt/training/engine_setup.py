"""Choose and build the engine, the generator and the evaluator of a training run."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from softprompt.config.loader import TrainConfig
from softprompt.config.train_args import TrainingArguments
from softprompt.data.examples import IGNORE, Example
from softprompt.distributed.process_group import World
from softprompt.engines.base import Engine
from softprompt.engines.choice import choose_engine
from softprompt.engines.data_parallel import DataParallelEngine
from softprompt.evaluation.classifier import MAX_LABELS, Classifier
from softprompt.evaluation.evaluator import Evaluator
from softprompt.evaluation.rows import SHORT_ANSWER
from softprompt.generation.generator import DataParallelGenerator, Generator, make_generator
from softprompt.models.capabilities import RowMaxima, max_positions, why_not_generate
from softprompt.models.fsdp import ShardedLayers
from softprompt.models.precision import resolve_device, resolve_dtype
from softprompt.prompt.soft_prompt import PromptEmbedding
from softprompt.training.early_stopping import metric_name
from softprompt.training.setup import Base, RunData
from softprompt.utils.errors import ConfigError

# `check_engine` uses this many tokens of the text, because the whole text may be longer than any training row.
CHECKED_TOKENS = 8


class Engines(NamedTuple):
    """The engine and the generator of a run.

    Attributes:
        engine: Computes losses and the prompt's gradient.
        generator: Generates answers with the same weights. None with `--stream_base`, because each generated token
            would read the whole base, and None if the base cannot generate with a prompt.
        how: One line for the user that says how the engine was chosen; None if there was no check.
    """

    engine: Engine
    generator: Generator | None
    how: str | None


def held_out_classifier(data: RunData, base: PreTrainedModel) -> Classifier | None:
    """Return what classifies the held-out rows; None if there are none, or if their answers are not labels.

    Raises:
        DataError: The chat template refuses a label as an answer.
    """
    if data.held_out is None:
        return None
    rows = [data.held_out_texts[number] for number in data.held_out.kept]
    return Classifier.of_held_out(rows, data.held_out, data.template, data.tokenizer, max_positions(base))


def make_engines(
    config: TrainConfig,
    base: Base,
    data: RunData,
    prompt: PromptEmbedding,
    world: World,
    classifier: Classifier | None = None,
) -> Engines:
    """Choose the engine and make the generator. With several ranks, both distribute rows over the ranks.

    Args:
        classifier: Classifies the held-out rows with this engine; see `held_out_classifier`.

    Raises:
        ConfigError, ModelError, TrainingError: See `choice.choose_engine`.
    """
    device = resolve_device(config.model.device)
    dtype = resolve_dtype(device, config.model.bf16, config.model.fp16)
    rows, values = data.train.examples, prompt.weight.detach()
    known = (part.examples for part in (data.train, data.held_out) if part)
    longest = config.data.max_length if data.streamed else RowMaxima.of(*known).longest
    if classifier and data.held_out:
        longest = max(longest, classifier.longest_row(data.held_out.examples, len(values)))
    join = base.blocks.join if isinstance(base.blocks, ShardedLayers) else _nothing
    agree = partial(_of_rank_0, world, join)
    engine, how = choose_engine(config, base.model, data.tokenizer, dtype, values, rows, longest, base.blocks, agree)
    generator = None if config.model.stream_base else make_generator(engine, base.model, data.tokenizer)
    join()  # other ranks may still run a check whose result this rank has in its cache
    if world.size == 1:
        return Engines(engine, generator, how)
    generator = generator and DataParallelGenerator(generator, world, join)
    return Engines(DataParallelEngine(engine, world, join), generator, how)


def check_engine(config: TrainConfig, base: Base, tokenizer: Any, prompt: PromptEmbedding, ids: list[int]) -> None:
    """Check --engine packed and --attn_implementation, if given, before there are rows to train on: run the engine on
    the first tokens of a text.

    Args:
        ids: The text as token ids.

    Raises:
        ConfigError: The base does not support them.
    """
    if config.given.get("engine") != "packed" and "attn_implementation" not in config.given:
        return
    dtype = resolve_dtype(resolve_device(config.model.device), config.model.bf16, config.model.fp16)
    row = ids[: min(CHECKED_TOKENS, config.data.max_length)]
    rows, values = [Example(row, [IGNORE, *row[1:]])], prompt.weight.detach()
    choose_engine(config, base.model, tokenizer, dtype, values, rows, blocks=base.blocks)


def make_evaluator(
    config: TrainConfig,
    data: RunData,
    base: PreTrainedModel,
    engine: Engine,
    generator: Generator | None,
    classifier: Classifier | None,
) -> Evaluator | None:
    """Make the evaluator of the held-out rows; None if there are none.

    Raises:
        ConfigError: The metric that selects the best model is not computed for these rows.
    """
    if data.held_out is None:
        return None
    if config.model.stream_base:
        print("held-out rows: no exact match, because an answer would read the whole base once for each of its tokens")
    elif generator is None:
        print(f"held-out rows: no exact match; {why_not_generate(base)}")
    batch_size = config.training.per_device_eval_batch_size
    held_out = data.held_out
    evaluator = Evaluator(
        engine, generator, data.tokenizer, held_out.examples, batch_size, held_out.missing, classifier
    )
    if evaluator.exact_match_note:
        print(f"Held out: {evaluator.exact_match_note}")
    _check_metric(config.training, evaluator)
    return evaluator


def _check_metric(args: TrainingArguments, evaluator: Evaluator) -> None:
    """Raise ConfigError if the metric that selects the best model or stops the run early is not computed."""
    if not (args.load_best_model_at_end or args.early_stopping_patience):
        return
    name, flag = metric_name(args), f"--metric_for_best_model {args.metric_for_best_model}"
    if name == "eval_exact_match" and not evaluator.compares_answers:
        raise ConfigError(
            f"{flag}: answers are compared only where all held-out "
            f"ones have at most {SHORT_ANSWER} tokens and --max_length does not truncate all of them, and neither with "
            "--stream_base nor with a base that cannot generate with a prompt; take eval_loss"
        )
    if name in ("eval_accuracy", "eval_macro_f1") and evaluator.classifier is None:
        raise ConfigError(
            f"{flag}: the held-out answers are not labels, which are 2 to {MAX_LABELS} different answers of at most "
            f"{SHORT_ANSWER} tokens that each occur several times; take eval_loss"
        )


def _of_rank_0(world: World, join: Callable[[], None], mine: Any) -> Any:
    """Return rank 0's value of `mine`. Every rank must call this. With a sharded base, `join` first takes part in the
    passes of the ranks that still compute their value (see `ShardedLayers.join`)."""
    join()
    return world.all_gather(mine)[0]


def _nothing() -> None: ...
