"""Validation of settings: each fault is a message that names the flag and says what to do instead."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from softprompt.config.data_args import DEFAULT_BUFFER_SIZE, MAX_BUFFER_SIZE, DataArguments, is_mini_task
from softprompt.config.distill_args import DistillationArguments
from softprompt.config.train_args import (
    DEFAULT_NUM_VIRTUAL_TOKENS,
    SECRETS,
    ModelArguments,
    PromptTuningArguments,
    SharingArguments,
    TrainingArguments,
)
from softprompt.config.value_parsers import parse_columns, parse_date, parse_duration, parse_labels
from softprompt.utils.errors import ConfigError

if TYPE_CHECKING:
    from softprompt.config.loader import TrainConfig

MAX_VIRTUAL_TOKENS = 100_000
MAX_ENCODER_HIDDEN_SIZE = 100_000
POSITIVE = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps", "save_steps", "learning_rate"),
    *("per_device_eval_batch_size", "tokens_per_microbatch", "save_total_limit", "eval_steps", "num_train_epochs"),
    "early_stopping_patience",
)
NOT_WHILE_DISTILLING = {
    "streaming": "all questions are answered before training",
    "stream_base": "each token of an answer would read the whole base",
    "shard_base": "one process answers the questions",
}
NOT_NEGATIVE = ("warmup_steps", "weight_decay", "max_grad_norm", "adam_epsilon", "early_stopping_threshold")


def precision_faults(bf16: bool | None, fp16: bool | None, device: str) -> list[str]:
    """Return the faults of the settings bf16, fp16 and device."""
    faults = []
    if bf16 and fp16:
        faults.append("--bf16 and --fp16 exclude each other; give one of them")
    if not re.fullmatch(r"auto|cpu|cuda(:(0|[1-9]\d{0,2}))?", device):
        faults.append(f"--device {device!r} is not auto, cpu, cuda or cuda:N")
    return faults


def quantization_bits(load_in_8bit: bool, load_in_4bit: bool) -> int | None:
    """Return the number of bits of a quantized weight, or None if the base is not quantized."""
    return 8 if load_in_8bit else 4 if load_in_4bit else None


def quantization_faults(load_in_8bit: bool, load_in_4bit: bool) -> list[str]:
    """Return the faults of the settings that quantize the base."""
    both = load_in_8bit and load_in_4bit
    return ["--load_in_8bit and --load_in_4bit exclude each other; give one of them"] if both else []


def seed_faults(seed: int) -> list[str]:
    """Return a message if torch does not accept `seed`."""
    return [] if 0 <= seed < 2**63 else [f"--seed {seed} must lie in [0, 2**63)"]


def _prompt_faults(prompt: PromptTuningArguments, distilled: str | None) -> Iterator[str]:
    """Yield the faults of the prompt's settings. `distilled` is the file that is distilled, whose text can be that of
    a TEXT initialization."""
    init, wanted = prompt.prompt_tuning_init, prompt.num_virtual_tokens
    if wanted is not None and wanted < 1:
        yield f"--num_virtual_tokens {wanted} is below 1; a soft prompt needs at least one token"
    if wanted is not None and wanted > MAX_VIRTUAL_TOKENS:
        yield f"--num_virtual_tokens {wanted} must be at most {MAX_VIRTUAL_TOKENS:,}"
    if init == "TEXT" and not (prompt.prompt_tuning_init_text or prompt.init_adapter or distilled):
        yield "--prompt_tuning_init TEXT needs --prompt_tuning_init_text 'some text'"
    if prompt.prompt_tuning_init_text and init != "TEXT":
        yield "--prompt_tuning_init_text is only used with --prompt_tuning_init TEXT; add that flag"
    if init == "CLASS_LABELS" and not prompt.class_labels and not prompt.init_adapter:
        yield "--prompt_tuning_init CLASS_LABELS needs --class_labels 'one,another'"
    if prompt.class_labels:
        labels, tokens = parse_labels(prompt.class_labels), wanted or DEFAULT_NUM_VIRTUAL_TOKENS
        if init != "CLASS_LABELS":
            yield "--class_labels is only used with --prompt_tuning_init CLASS_LABELS; add that flag"
        if not all(labels) or len(set(labels)) < len(labels):
            yield f"--class_labels {prompt.class_labels!r} has an empty or repeated label; give each label once"
        elif len(labels) > tokens:
            yield f"--class_labels has {len(labels)} labels for {tokens} virtual tokens; raise --num_virtual_tokens"
    if prompt.vocab_population is not None:
        if prompt.vocab_population < 1:
            yield f"--vocab_population {prompt.vocab_population} must be above 0"
        if init not in ("SAMPLE_VOCAB", "CLASS_LABELS"):
            yield "--vocab_population is only used with --prompt_tuning_init SAMPLE_VOCAB or CLASS_LABELS; add one"
    if (width := prompt.encoder_hidden_size) is not None:
        if not 0 < width <= MAX_ENCODER_HIDDEN_SIZE:
            yield f"--encoder_hidden_size {width} must lie in [1, {MAX_ENCODER_HIDDEN_SIZE:,}]"
        if prompt.prompt_reparameterization == "none":
            yield "--encoder_hidden_size is only used with --prompt_reparameterization; add that flag"


def faults(config: "TrainConfig") -> Iterator[str]:
    """Yield the faults of a training run's settings."""
    for part in config.parts:
        yield from _text_faults(dataclasses.asdict(part))
    model, training = config.model, config.training
    yield from _model_faults(model)
    yield from _data_faults(config.data, config.distillation)
    yield from _prompt_faults(config.prompt, config.distillation.text)
    yield from _training_faults(training)
    yield from _evaluation_faults(config.data, training, config.given)
    yield from _sharing_faults(config.sharing)
    yield from _distillation_faults(config.distillation, config)
    if training.find_learning_rate and "learning_rate" in config.given:
        yield "--find_learning_rate and --learning_rate exclude each other; give one of them"


def _text_faults(settings: Mapping[str, Any]) -> Iterator[str]:
    for name, text in settings.items():
        if name in SECRETS:
            continue
        if text == "":
            yield f"--{name} is empty; give it a value or leave it out"
        elif isinstance(text, str) and "\0" in text:
            yield f"--{name} {text!r} contains a null character; remove it"


def _model_faults(model: ModelArguments) -> Iterator[str]:
    yield from precision_faults(model.bf16, model.fp16, model.device)
    yield from quantization_faults(model.load_in_8bit, model.load_in_4bit)
    if (model.stream_base or model.shard_base) and (model.load_in_8bit or model.load_in_4bit):
        yield (
            "--load_in_8bit and --load_in_4bit quantize a whole base and exclude --stream_base and --shard_base; "
            "give only one of these flags"
        )
    if model.engine == "padded" and model.stream_base:
        yield "--stream_base is for the packed engine; leave --engine padded out"
    if model.stream_base and model.shard_base:
        yield (
            "--stream_base and --shard_base exclude each other, because a block is read either from disk or from the "
            "other ranks; give one of them"
        )
    by_layers = model.stream_base or model.shard_base or model.load_in_8bit or model.load_in_4bit
    if model.offload_folder and not by_layers:
        yield (
            "--offload_folder is only used with --stream_base, --shard_base, --load_in_8bit or --load_in_4bit; "
            "add one of them"
        )
    if not model.max_activation_gib >= 0:
        yield f"--max_activation_gib {model.max_activation_gib} must not be negative"


def _data_faults(data: DataArguments, distillation: DistillationArguments) -> Iterator[str]:
    if data.dataset is None and distillation.distill_prompt:
        yield f"{distillation.flag} needs questions; name them with --dataset (a .txt with one on each line, or rows)"
    elif data.dataset is None and not distillation.distill_context:
        yield "--dataset is missing; name the rows to train on (a file, a folder, a hub id or mini:TASK)"
    if data.eval_dataset and data.eval_rows:
        yield "--eval_dataset and --eval_rows exclude each other; give one of them"
    if data.eval_split and data.eval_rows:
        yield "--eval_split and --eval_rows exclude each other; give one of them"
    if is_mini_task(data.dataset) and data.dataset_split != "train":
        yield f"--dataset_split {data.dataset_split}: {data.dataset} has no splits; leave it out"
    if data.eval_split and is_mini_task(data.held_out):
        yield f"--eval_split {data.eval_split}: {data.held_out} has held-out rows of its own; leave it out"
    if data.eval_rows < 0:
        yield f"--eval_rows {data.eval_rows} must not be negative"
    if data.buffer_size != DEFAULT_BUFFER_SIZE and not data.streaming:
        yield "--buffer_size is only used with --streaming; add that flag"
    if data.preprocessing_num_workers is not None and data.preprocessing_num_workers < 1:
        yield f"--preprocessing_num_workers {data.preprocessing_num_workers} must be at least 1"
    if not 0 < data.buffer_size <= MAX_BUFFER_SIZE:
        yield f"--buffer_size {data.buffer_size} must lie in [1, {MAX_BUFFER_SIZE:,}]"
    if data.streaming and is_mini_task(data.dataset):
        yield f"--streaming: {data.dataset} is generated in memory; name a file, a folder or a hub id, or leave it out"
    if data.max_length < 2:
        yield f"--max_length {data.max_length} is too small to hold any target; give at least 2"
    if data.chat_template_date and data.template != "chat":
        yield "--chat_template_date is only used with --template chat; add that flag"
    for parse, value in ((parse_columns, data.columns), (parse_date, data.chat_template_date or None)):
        try:
            parse(value)
        except ConfigError as error:
            yield str(error)


def _training_faults(training: TrainingArguments) -> Iterator[str]:
    for name in POSITIVE:
        value = getattr(training, name)
        if value is not None and not value > 0:
            yield f"--{name} {value} must be above 0"
    for name in NOT_NEGATIVE:
        if not getattr(training, name) >= 0:
            yield f"--{name} {getattr(training, name)} must not be negative"
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(training, name) < 1:
            yield f"--{name} {getattr(training, name)} must lie in [0, 1)"
    for name, most in (("num_train_epochs", 100_000), ("max_steps", 1_000_000_000)):
        if getattr(training, name) > most:
            yield f"--{name} {getattr(training, name)} must be at most {most:,}"
    yield from seed_faults(training.seed)
    if training.max_time:
        try:
            parse_duration(training.max_time)
        except ConfigError as error:
            yield str(error)


def _evaluation_faults(data: DataArguments, training: TrainingArguments, given: Mapping[str, Any]) -> Iterator[str]:
    if training.eval_strategy != "no" and not (data.held_out or data.eval_rows):
        name = "eval_steps" if "eval_steps" in given and "eval_strategy" not in given else "eval_strategy"
        asked = f"--{name} {getattr(training, name)}"
        yield f"{asked} needs held-out rows; give --eval_dataset FILE or --eval_rows N"
    for name in ("load_best_model_at_end", "early_stopping_patience"):
        if getattr(training, name) and training.eval_strategy == "no":
            yield f"--{name} needs evaluations during training; add --eval_strategy epoch or --eval_steps N"
    if training.early_stopping_threshold and training.early_stopping_patience is None:
        yield "--early_stopping_threshold is only used with --early_stopping_patience N; add that flag"


def _distillation_faults(distillation: DistillationArguments, config: "TrainConfig") -> Iterator[str]:
    if distillation.distill_prompt and distillation.distill_context:
        yield "--distill_prompt and --distill_context exclude each other; give one of them"
    for name in ("distill_samples", "distill_max_new_tokens", "distill_questions"):
        if getattr(distillation, name) < 1:
            yield f"--{name} {getattr(distillation, name)} must be at least 1"
        used = distillation.distill_context if name == "distill_questions" else distillation.text
        if not used and getattr(distillation, name) != getattr(DistillationArguments, name):
            either = "" if name == "distill_questions" else "--distill_prompt FILE or "
            yield f"--{name} is only used with {either}--distill_context FILE; add that flag"
    metric = config.training.metric_for_best_model.removeprefix("eval_")
    if not distillation.text:
        if metric in ("kl", "agreement"):
            yield f"--metric_for_best_model {metric} is only computed with --distill_prompt FILE; give eval_loss"
        return
    for name, why in NOT_WHILE_DISTILLING.items():
        if any(getattr(part, name, False) for part in config.parts):
            yield f"--{name} excludes --distill_prompt and --distill_context, because {why}; give one of them"
    rows, written = config.data.eval_rows or 0, distillation.distill_questions
    if distillation.distill_context and config.data.dataset is None and rows >= written > 0:
        yield (
            f"--eval_rows {rows} leaves none of the {written} questions of --distill_questions for training; give a "
            "smaller --eval_rows or a larger --distill_questions"
        )
    if config.data.truncation_side == "input":
        yield "--truncation_side input: the questions of a distillation are not shortened; give a larger --max_length"
    if metric not in ("loss", "kl", "agreement"):
        yield f"--metric_for_best_model {metric} is not computed in a distillation; give loss or agreement"


def _sharing_faults(sharing: SharingArguments) -> Iterator[str]:
    for name in ("hub_model_id", "hub_private_repo", "hub_token"):
        if getattr(sharing, name) is not None and not sharing.push_to_hub:
            yield f"--{name} is only used with --push_to_hub; add that flag"
    if sharing.hub_token is not None and not sharing.hub_token.strip():
        yield "--hub_token is empty; give a token, or leave it out if HF_TOKEN is set"
