"""From settings to all that a run is made of, loaded, checked and told; nothing is written."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from softprompt.config.loader import TrainConfig, checked
from softprompt.config.validation import bits_of
from softprompt.data.build_data import Rows, make_loader, make_template, read_rows, tokenize_rows
from softprompt.data.dataloader import WindowLoader, rows_of_a_step
from softprompt.data.dataset import Row
from softprompt.data.template import ignored_keys
from softprompt.data.tokenization import Tokenized
from softprompt.distributed.process_group import World
from softprompt.engines.base import Engine
from softprompt.engines.data_parallel import DataParallelEngine
from softprompt.engines.factory import make_engine
from softprompt.engines.padded import PromptTunedModel
from softprompt.evaluation.evaluator import SHORT_ANSWER, Evaluator
from softprompt.generation.data_parallel import DataParallelGenerator
from softprompt.generation.factory import generator_beside
from softprompt.generation.hf_generate import Generator
from softprompt.models.capabilities import (
    RowMaxima,
    check_init_text,
    check_rows_fit,
    check_vocabulary,
    why_not_generate,
)
from softprompt.models.fsdp import ShardedBlocks, shard_blocks
from softprompt.models.loading import (
    base_path,
    freeze,
    load_config,
    load_tokenizer,
    move_to_device,
    read_base,
    weight_files,
)
from softprompt.models.meta_loading import load_meta_model
from softprompt.models.precision import resolve_device, resolve_dtype
from softprompt.models.quantization import quantize_blocks
from softprompt.prompt.adapter_io import load_adapter
from softprompt.prompt.initial import initial_prompt
from softprompt.prompt.soft_prompt import PromptEmbedding
from softprompt.runs.output_dir import choose_output_dir
from softprompt.runs.state import Metrics, TrainingState
from softprompt.runs.train_state import find_checkpoint, load_state
from softprompt.training.console import print_data, print_model, print_rows, print_steps, tell_end
from softprompt.training.early_stopping import BestMetric, metric_name
from softprompt.training.metrics_log import Totals
from softprompt.training.resume_checks import (
    align_position,
    are_comparable,
    best_so_far,
    check_rows,
    other_contents,
    rows_of_steps,
)
from softprompt.training.resume_settings import merge_settings
from softprompt.training.tensorboard import check_installed
from softprompt.utils.atomic_io import check_writable
from softprompt.utils.errors import ConfigError
from softprompt.utils.fingerprints import fingerprint_of_base
from softprompt.utils.safetensors_io import StoredTensor
from softprompt.utils.tokenizer_fingerprint import tokenizer_fingerprints
from softprompt.utils.torchrun_env import launched

SAMPLED = 100  # rows that are kept as texts, to show one of them


@dataclass(frozen=True)
class Prepared:
    """All that a run is made of, loaded and checked; nothing has been written. A resumed run has its `checkpoint`,
    where its loop goes on, and what it had added up until there; `fingerprints` say what it must not be resumed
    without. `rows` are the first of the training rows; of a stream, `data` is the beginning. `end` is the special token
    that the template writes behind an answer. `feed` counts the rows of all ranks of the `world` together."""

    config: TrainConfig
    output_dir: Path
    rows: list[Row]
    data: Tokenized
    held_out: Tokenized | None
    tokenizer: Any
    end: str | None
    feed: WindowLoader
    base: PreTrainedModel
    prompt: PromptEmbedding
    engine: Engine
    evaluator: Evaluator | None
    fingerprints: dict[str, str]
    checkpoint: Path | None
    start: TrainingState
    totals: Totals
    history: list[Metrics]
    best: BestMetric
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
    best: BestMetric = field(default_factory=BestMetric)
    fingerprints: Mapping[str, str] = field(default_factory=dict)


class _Loaded(NamedTuple):
    """What computes, and by which content of the files it is known; of a resumed run `others` are those that were
    another content before."""

    base: PreTrainedModel
    prompt: PromptEmbedding
    engine: Engine
    generator: Generator | None
    fingerprints: dict[str, str]
    others: list[str]


def prepare(config: TrainConfig, world: World, check: Callable[[TrainConfig, Path], None] | None = None) -> Prepared:
    """Load and check what `config` names, telling what is found; every rank of the world does so by itself. Rank 0
    calls `check` with the output folder before any row is read.

    Raises:
        SoftpromptError: anything in the settings, the data, the base or the output folder that stands in the way.
    """
    begun = _begun(config, world)
    config = begun.config
    sharded = _is_sharded(config, world)
    device = resolve_device(config.model.device)
    dtype = resolve_dtype(device, config.model.bf16, config.model.fp16)
    output_dir = choose_output_dir(config, begun.checkpoint)
    _check_places(config)
    if check and world.is_main:
        check(config, output_dir)
    load_config(base_path(str(config.model.model_name_or_path)))  # what cannot be a base is said before rows are read
    template = make_template(config)
    rows = read_rows(config, template)
    print_rows(config, rows.train[0], rows.source.rows if rows.source else len(rows.train), rows.notes)
    tokenizer = load_tokenizer(base_path(str(config.model.model_name_or_path)))
    data, held_out = tokenize_rows(config, template, tokenizer, rows)
    ignored = ignored_keys([*rows.train, *rows.held_out], tokenizer)
    print_data(data, held_out, config.data.buffer_size if rows.source else None, ignored)
    end = template.end(rows.train[0], tokenizer)
    tell_end(end, tokenizer)
    feed = make_loader(config, rows, data, tokenizer, begun.rows_per_step)
    extent = RowMaxima.of(e.input_ids for some in (data, held_out) if some for e in some.examples)
    loaded = _loaded(begun, rows, extent, tokenizer, device, dtype, world, sharded)
    searches = config.training.find_learning_rate and begun.checkpoint is None
    print_steps(config, feed, world.size, output_dir, searches)
    return Prepared(
        config=config,
        output_dir=output_dir,
        rows=rows.train[:SAMPLED],
        data=data,
        held_out=held_out,
        tokenizer=tokenizer,
        end=end,
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
        best=begun.best if are_comparable(loaded.others) else BestMetric(),
        world=world,
        searches=searches,
    )


def _begun(config: TrainConfig, world: World) -> _Begun:
    checkpoint = find_checkpoint(config, print)
    if not checkpoint:
        return _Begun(checked(config), rows_of_a_step(config.training, world.size))
    start, saved = load_state(checkpoint)
    config = merge_settings(config, checkpoint, saved, print)
    rows_per_step = rows_of_steps(config, saved, world.size)
    check_rows(config, rows_per_step, saved, checkpoint, print)
    best = best_so_far(config, saved, checkpoint, print)
    start, totals = align_position(start, config, saved), Totals(**saved["totals"])
    return _Begun(config, rows_per_step, checkpoint, start, totals, saved["history"], best, saved["fingerprints"])


def _loaded(
    begun: _Begun,
    rows: Rows,
    extent: RowMaxima,
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
    fingerprints = {**rows.fingerprints, **tokenizer_fingerprints(tokenizer)}
    if world.is_main or not sharded:  # else every rank would read the whole base
        keep = not config.training.dry_run
        fingerprints["base"] = fingerprint_of_base(base, weight_files(path), keep=keep, blocks=stored)
    others: list[str] = []
    if checkpoint:
        others = other_contents(begun.fingerprints, fingerprints, checkpoint, config.training.ignore_data_skip, print)
    check_vocabulary(tokenizer, base, path)
    check_init_text(config.prompt.prompt_tuning_init_text, tokenizer, base)
    quantised = quantize_blocks(base, bits, device) if bits else None
    base = move_to_device(freeze(base, dtype), device)
    values = load_adapter(checkpoint).prompt if checkpoint else initial_prompt(config, tokenizer, base)
    check_rows_fit(base, len(values), config.data.max_length, extent, streamed=rows.source is not None)
    prompt = PromptEmbedding(values).to(device)
    shards = shard_blocks(base, stored, world) if sharded and stored else None
    engine = make_engine(config, base, tokenizer, dtype, len(values), shards or quantised or stored)
    generator = None if config.model.stream_base else generator_beside(engine, base, tokenizer)
    if world.size > 1:
        engine, generator = _shared(engine, generator, world, shards)
    print_model(config, PromptTunedModel(prompt, base), engine)
    return _Loaded(base, prompt, engine, generator, fingerprints, others)


def _check_places(config: TrainConfig) -> None:
    """What would only fail late: where else than to `output_dir` the run writes."""
    if config.sharing.report_to == "tensorboard":
        check_installed()
    offload = Path(config.model.offload_folder or ".")
    if offload.exists() and not offload.is_dir():
        raise ConfigError(f"--offload_folder {offload}: is no folder; name one, or a place where one can be made")
    if config.model.offload_folder:
        check_writable(offload, "--offload_folder")


def _evaluator(config: TrainConfig, loaded: _Loaded, tokenizer: Any, held_out: Tokenized) -> Evaluator:
    if config.model.stream_base:
        print("held-out rows: loss and perplexity; an answer would read the base once more for every token of it")
    elif loaded.generator is None:
        print(f"held-out rows: loss and perplexity alone; {why_not_generate(loaded.base)}")
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


def _read_base(config: TrainConfig, path: str, sharded: bool) -> tuple[PreTrainedModel, dict[str, StoredTensor] | None]:
    """A base, and where its blocks are stored if they are yet to be read."""
    if config.model.stream_base or sharded:
        return load_meta_model(path, "--shard_base" if sharded else "--stream_base")
    return read_base(path), None


def _shared(
    engine: Engine, generator: Generator | None, world: World, shards: ShardedBlocks | None
) -> tuple[Engine, Generator | None]:
    """What shares out the rows among the ranks."""
    rest = [shards.join] if shards else []
    return DataParallelEngine(engine, world, *rest), generator and DataParallelGenerator(generator, world, *rest)


def _check_metric(config: TrainConfig, evaluator: Evaluator) -> None:
    args = config.training
    wanted = args.load_best_model_at_end or args.early_stopping_patience
    if wanted and metric_name(args) == "eval_exact_match" and not evaluator.compares_answers:
        raise ConfigError(
            f"--metric_for_best_model {args.metric_for_best_model}: answers are compared only where all held-out "
            f"ones have at most {SHORT_ANSWER} tokens and some are whole, and neither with --stream_base nor with a "
            "base that cannot answer behind a prompt; take eval_loss"
        )
