"""From settings to all that a run is made of, loaded, checked and told; nothing is written."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from softprompt.announce import tell_data, tell_model, tell_rows, tell_steps
from softprompt.best import Best, metric_name
from softprompt.board import check_installed
from softprompt.build import base_path, choose_output_dir, initial_prompt
from softprompt.checkpoint import load_adapter
from softprompt.config import TrainConfig
from softprompt.data import Tokenized
from softprompt.distributed import World
from softprompt.engines import generator_beside, make_engine
from softprompt.errors import ConfigError
from softprompt.evaluate import SHORT_ANSWER, Evaluator
from softprompt.faults import bits_of
from softprompt.feed import Feed, rows_of_a_step
from softprompt.fingerprints import fingerprint_of_base, fingerprint_of_tokenizer
from softprompt.generate import Generator
from softprompt.hollow import read_hollow
from softprompt.intake import Rows, make_feed, read_rows, template_of, tokenize_rows
from softprompt.model import (
    Engine,
    SoftPromptedModel,
    freeze,
    load_tokenizer,
    place,
    read_base,
    resolve_device,
    resolve_dtype,
    weight_files,
)
from softprompt.progress import Totals
from softprompt.prompt import PromptEmbedding
from softprompt.push import check_hub
from softprompt.quantised import quantise
from softprompt.resume import (
    check_fingerprints,
    check_streaming,
    find_checkpoint,
    in_its_order,
    kept_rows_per_step,
    load_state,
    merged,
)
from softprompt.rows import Row
from softprompt.sharded import Shards, shard
from softprompt.shared import SharedEngine, SharedGenerator
from softprompt.stored import Stored
from softprompt.torchrun import launched
from softprompt.trainer import Metrics, TrainingState


@dataclass(frozen=True)
class Prepared:
    """All that a run is made of, loaded and checked; nothing has been written. A resumed run has its `checkpoint`,
    where its loop goes on, and what it had added up until there; `fingerprints` say what it must not be resumed
    without. Of a stream, `rows` and `data` are the beginning. `feed` counts the rows of all ranks of the `world`
    together."""

    config: TrainConfig
    output_dir: Path
    rows: list[Row]
    data: Tokenized
    held_out: Tokenized | None
    tokenizer: Any
    feed: Feed
    base: PreTrainedModel
    prompt: PromptEmbedding
    engine: Engine
    evaluator: Evaluator | None
    fingerprints: dict[str, str]
    checkpoint: Path | None
    start: TrainingState
    totals: Totals
    history: list[Metrics]
    best: Best
    world: World
    searches: bool  # whether the learning rate is yet to be found; a resumed run has it
    starts: list[list[str]] = field(default_factory=list)  # every rank's of torchrun


@dataclass(frozen=True)
class _Begun:
    """The settings under which a run begins, or goes on from its checkpoint, and what that holds."""

    config: TrainConfig
    rows_per_step: int
    checkpoint: Path | None = None
    start: TrainingState = field(default_factory=TrainingState)
    totals: Totals = field(default_factory=Totals)
    history: list[Metrics] = field(default_factory=list)
    best: Best = field(default_factory=Best)
    fingerprints: Mapping[str, str] = field(default_factory=dict)


class _Loaded(NamedTuple):
    """What computes, and by which content of the files it is known."""

    base: PreTrainedModel
    prompt: PromptEmbedding
    engine: Engine
    generator: Generator | None
    fingerprints: dict[str, str]


def prepare(config: TrainConfig, world: World) -> Prepared:
    """Load and check what `config` names, telling what is found; every rank of the world does so by itself.

    Raises:
        SoftpromptError: anything in the settings, the data, the base or the output folder that stands in the way.
    """
    begun = _begun(config, world)
    config = begun.config
    sharded = _is_sharded(config, world)
    device = resolve_device(config.model.device)
    dtype = resolve_dtype(device, config.model.bf16, config.model.fp16)
    output_dir = choose_output_dir(config, begun.checkpoint)
    _check_places(config, output_dir, world)
    template = template_of(config)
    rows = read_rows(config, template)
    tell_rows(config, rows.train[0], rows.source.rows if rows.source else len(rows.train))
    tokenizer = load_tokenizer(base_path(str(config.model.model_name_or_path)))
    data, held_out = tokenize_rows(config, template, tokenizer, rows)
    tell_data(data, held_out, config.data.buffer_size if rows.source else None)
    feed = make_feed(config, rows, data, tokenizer, begun.rows_per_step)
    loaded = _loaded(begun, rows, tokenizer, device, dtype, world, sharded)
    searches = config.training.find_learning_rate and begun.checkpoint is None
    tell_steps(config, feed, world.size, output_dir, searches)
    return Prepared(
        config=config,
        output_dir=output_dir,
        rows=rows.train,
        data=data,
        held_out=held_out,
        tokenizer=tokenizer,
        feed=feed,
        base=loaded.base,
        prompt=loaded.prompt,
        engine=loaded.engine,
        evaluator=_evaluator(config, loaded, tokenizer, held_out) if held_out else None,
        fingerprints=loaded.fingerprints,
        checkpoint=begun.checkpoint,
        start=begun.start,
        totals=begun.totals,
        history=begun.history,
        best=begun.best,
        world=world,
        searches=searches,
    )


def _begun(config: TrainConfig, world: World) -> _Begun:
    checkpoint = find_checkpoint(config, print)
    if not checkpoint:
        return _Begun(config, rows_of_a_step(config.training, world.size))
    start, saved = load_state(checkpoint)
    config = merged(config, checkpoint, saved, print)
    rows_per_step = kept_rows_per_step(config, saved) or rows_of_a_step(config.training, world.size)
    check_streaming(config, saved, checkpoint)
    start, totals, best = in_its_order(start, config, saved), Totals(**saved["totals"]), Best(**saved["best"])
    return _Begun(config, rows_per_step, checkpoint, start, totals, saved["history"], best, saved["fingerprints"])


def _loaded(
    begun: _Begun,
    rows: Rows,
    tokenizer: Any,
    device: torch.device,
    dtype: torch.dtype,
    world: World,
    sharded: bool,
) -> _Loaded:
    """The base, whole, in files, quantised or shared out, and the prompt before it; files that are not those of the
    checkpoint are refused before the base is placed."""
    config, checkpoint = begun.config, begun.checkpoint
    path = base_path(str(config.model.model_name_or_path))
    bits = bits_of(config.model.load_in_8bit, config.model.load_in_4bit)
    base, stored = _read_base(config, path, sharded)
    fingerprints = {"dataset": rows.fingerprint, "tokenizer": fingerprint_of_tokenizer(tokenizer)}
    if world.is_main or not sharded:  # else every rank would read the whole base
        keep = not config.training.dry_run
        fingerprints["base"] = fingerprint_of_base(base, weight_files(path), keep=keep, blocks=stored)
    if checkpoint and not config.training.ignore_data_skip:
        check_fingerprints(begun.fingerprints, fingerprints, checkpoint)
    quantised = quantise(base, bits, device) if bits else None
    base = place(freeze(base, dtype), device)
    values = load_adapter(checkpoint).prompt if checkpoint else initial_prompt(config, tokenizer, base)
    prompt = PromptEmbedding(values).to(device)
    shards = shard(base, stored, world) if sharded and stored else None
    engine = make_engine(config, base, tokenizer, dtype, len(values), shards or quantised or stored)
    generator = None if config.model.stream_base else generator_beside(engine, base, tokenizer)
    if world.size > 1:
        engine, generator = _shared(engine, generator, world, shards)
    tell_model(config, SoftPromptedModel(prompt, base), engine)
    return _Loaded(base, prompt, engine, generator, fingerprints)


def _check_places(config: TrainConfig, output_dir: Path, world: World) -> None:
    """What would only fail late: where else than to `output_dir` the run writes."""
    if config.sharing.report_to == "tensorboard":
        check_installed()
    if config.sharing.push_to_hub and world.is_main:
        check_hub(config.sharing, output_dir, print)
    offload = Path(config.model.offload_folder or ".")
    if offload.exists() and not offload.is_dir():
        raise ConfigError(f"--offload_folder {offload}: is no folder; name one, or a place where one can be made")


def _evaluator(config: TrainConfig, loaded: _Loaded, tokenizer: Any, held_out: Tokenized) -> Evaluator:
    if config.model.stream_base:
        print("held-out rows: loss and perplexity; an answer would read the base once more for every token of it")
    batch_size = config.training.per_device_eval_batch_size
    evaluator = Evaluator(loaded.engine, loaded.generator, tokenizer, held_out.examples, batch_size, held_out.missing)
    if evaluator.told:
        print(f"Held out: {evaluator.told}")
    _check_metric(config, evaluator)
    return evaluator


def _is_sharded(config: TrainConfig, world: World) -> bool:
    """Whether the base is shared out; a single process that torchrun started has a share of one."""
    if config.model.shard_base and not launched():
        raise ConfigError(
            "--shard_base shares a base out among processes, and this is one alone; start several with "
            "torchrun --nproc_per_node=N train.py …, or give --shard_base false"
        )
    if config.model.shard_base and world.size == 1:
        print("--shard_base: there is one process, which holds the whole base")
    return config.model.shard_base and world.size > 1


def _read_base(config: TrainConfig, path: str, sharded: bool) -> tuple[PreTrainedModel, dict[str, Stored] | None]:
    """A base, and where its blocks are stored if they are yet to be read."""
    if config.model.stream_base or sharded:
        return read_hollow(path, "--shard_base" if sharded else "--stream_base")
    return read_base(path), None


def _shared(
    engine: Engine, generator: Generator | None, world: World, shards: Shards | None
) -> tuple[Engine, Generator | None]:
    """What shares out the rows among the ranks."""
    rest = [shards.rest] if shards else []
    return SharedEngine(engine, world, *rest), generator and SharedGenerator(generator, world, *rest)


def _check_metric(config: TrainConfig, evaluator: Evaluator) -> None:
    args = config.training
    wanted = args.load_best_model_at_end or args.early_stopping_patience
    if wanted and metric_name(args) == "eval_exact_match" and not evaluator.compares_answers:
        raise ConfigError(
            f"--metric_for_best_model {args.metric_for_best_model}: answers are compared only where all held-out "
            f"ones have at most {SHORT_ANSWER} tokens and some are whole, and not with --stream_base; take eval_loss"
        )
