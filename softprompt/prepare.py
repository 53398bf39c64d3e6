"""From settings to all that a run is made of, loaded, checked and told; nothing is written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from softprompt.announce import tell_data, tell_model, tell_rows, tell_steps
from softprompt.best import Best, metric_name
from softprompt.board import check_installed
from softprompt.build import base_path, choose_output_dir, initial_prompt, read_rows, tokenize_rows
from softprompt.checkpoint import load_adapter
from softprompt.config import TrainConfig
from softprompt.data import Tokenized
from softprompt.distributed import World
from softprompt.engines import generator_beside, make_engine
from softprompt.errors import ConfigError
from softprompt.evaluate import SHORT_ANSWER, Evaluator
from softprompt.fingerprints import fingerprint_of_base, fingerprint_of_rows, fingerprint_of_tokenizer
from softprompt.hollow import read_hollow
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
from softprompt.resume import check_fingerprints, find_checkpoint, kept_rows_per_step, load_state, merged
from softprompt.rows import Row
from softprompt.shared import SharedEngine, SharedGenerator
from softprompt.template import Template
from softprompt.trainer import Metrics, TrainingState, rows_of_a_step, total_steps


@dataclass(frozen=True)
class Prepared:
    """All that a run is made of, loaded and checked; nothing has been written. A resumed run has
    its `checkpoint`, where its loop goes on, and what it had added up until there; `fingerprints` say what it must not
    be resumed without. `rows_per_step` is that of all ranks of the `world` together."""

    config: TrainConfig
    output_dir: Path
    rows: list[Row]
    data: Tokenized
    held_out: Tokenized | None
    tokenizer: Any
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
    rows_per_step: int
    world: World

    @property
    def total_steps(self) -> int:
        return total_steps(len(self.data.examples), self.config.training, self.rows_per_step)


def prepare(config: TrainConfig, world: World) -> Prepared:
    """Load and check what `config` names, telling what is found; every rank of the world does so by itself.

    Raises:
        SoftpromptError: anything in the settings, the data, the base or the output folder that stands in the way.
    """
    start, totals, best, saved, rows_per_step = TrainingState(), Totals(), Best(), None, None
    checkpoint = find_checkpoint(config, print)
    if checkpoint:
        start, saved = load_state(checkpoint)
        config, totals = merged(config, checkpoint, saved, print), Totals(**saved["totals"])
        best = Best(**saved["best"])
        rows_per_step = kept_rows_per_step(config, saved)
    rows_per_step = rows_per_step or rows_of_a_step(config.training, world.size)
    device = resolve_device(config.model.device)
    dtype = resolve_dtype(device, config.model.bf16, config.model.fp16)
    output_dir = choose_output_dir(config, checkpoint)
    if config.sharing.report_to == "tensorboard":
        check_installed()
    if config.sharing.push_to_hub and world.is_main:
        check_hub(config.sharing, output_dir, print)
    offload = Path(config.model.offload_folder or ".")
    if offload.exists() and not offload.is_dir():
        raise ConfigError(f"--offload_folder {offload}: is no folder; name one, or a place where one can be made")
    template = Template(config.data.template or "default")
    rows, held_out = read_rows(config, template)
    tell_rows(config, rows)
    path = base_path(str(config.model.model_name_or_path))
    tokenizer = load_tokenizer(path)
    data, held_out_data = tokenize_rows(config, template, tokenizer, rows, held_out)
    tell_data(data, held_out_data)
    base, blocks = read_hollow(path) if config.model.stream_base else (read_base(path), None)
    fingerprints = {
        "dataset": fingerprint_of_rows(rows),
        "tokenizer": fingerprint_of_tokenizer(tokenizer),
        "base": fingerprint_of_base(base, weight_files(path), keep=not config.training.dry_run, blocks=blocks),
    }
    if checkpoint and saved and not config.training.ignore_data_skip:
        check_fingerprints(saved["fingerprints"], fingerprints, checkpoint)
    base = place(freeze(base, dtype), device)
    values = load_adapter(checkpoint).prompt if checkpoint else initial_prompt(config, tokenizer, base)
    prompt = PromptEmbedding(values).to(device)
    engine = make_engine(config, base, tokenizer, dtype, len(values), blocks)
    generator = None if config.model.stream_base else generator_beside(engine, base, tokenizer)
    if world.size > 1:
        engine, generator = SharedEngine(engine, world), generator and SharedGenerator(generator, world)
    tell_model(config, SoftPromptedModel(prompt, base), engine)
    tell_steps(config, len(data.examples), rows_per_step, world.size, output_dir)
    evaluator = None
    if held_out_data:
        if config.model.stream_base:
            print("held-out rows: loss and perplexity; an answer would read the base once more for every token of it")
        batch_size = config.training.per_device_eval_batch_size
        evaluator = Evaluator(engine, generator, tokenizer, held_out_data.examples, batch_size)
        _check_metric(config, evaluator)
    made = (config, output_dir, rows, data, held_out_data, tokenizer, base, prompt, engine, evaluator, fingerprints)
    history = saved["history"] if saved else []
    return Prepared(*made, checkpoint, start, totals, history, best, rows_per_step, world)


def _check_metric(config: TrainConfig, evaluator: Evaluator) -> None:
    args = config.training
    wanted = args.load_best_model_at_end or args.early_stopping_patience
    if wanted and metric_name(args) == "eval_exact_match" and not evaluator.compares_answers:
        raise ConfigError(
            f"--metric_for_best_model {args.metric_for_best_model}: answers are compared only where all held-out "
            f"ones have at most {SHORT_ANSWER} tokens, and not with --stream_base; take eval_loss"
        )
