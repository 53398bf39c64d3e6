"""Every setting, with its default, in one place. Names are PEFT's and TrainingArguments' wherever they have one.

Four frozen dataclasses (one per group of `--help`) make a `TrainConfig`; presets override their defaults, a config file
overrides the preset, and the command line overrides both. Validation collects every fault and raises one `ConfigError`.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from softprompt.errors import ConfigError
from softprompt.fields import AUTO, build, nearest, option
from softprompt.redact import hide
from softprompt.sharing_config import SECRETS, SharingArguments, sharing_faults
from softprompt.stopping import seconds_of

# Chosen by the sweeps that README.md quotes ("The learning rate"). A RANDOM prompt has unit variance and needs steps
# that are visible beside 1; the others start on word embeddings, which are smaller.
DEFAULT_LEARNING_RATES = {"RANDOM": 3e-2, "TEXT": 1e-2, "SAMPLE_VOCAB": 1e-2, "CLASS_LABELS": 1e-2}
DEFAULT_NUM_VIRTUAL_TOKENS = 10
DEFAULT_VOCAB_POPULATION = 5000  # of the words beside class labels, as in google-research/prompt-tuning
DEFAULT_BUFFER_SIZE, MOST_BUFFERED = 10_000, 1_000_000_000
NEWEST = "newest"  # what --resume_from_checkpoint means without a value


@dataclass(frozen=True)
class ModelArguments:
    _argument_group_name: ClassVar[str] = "base model"

    model_name_or_path: str | None = option(
        None, "Base model: a local folder, a hub id such as Langboat/bloom-1b4-zh, or `mini`, the one in this package."
    )
    device: str = option("auto", "auto (CUDA where there is one, else the CPU), cpu, cuda or cuda:N.")
    bf16: bool | None = option(
        None, "bf16 autocast. (default: on CUDA where the card has it; `--bf16 false` asks for fp32)"
    )
    fp16: bool | None = option(
        None, "fp16 autocast with a GradScaler. (default: on CUDA where the card has no bf16; `--fp16 false` as above)"
    )
    engine: Literal["auto", "packed", "padded"] = option(
        "auto",
        "packed: the exact fast forward for BLOOM; padded: the base's own forward, for any causal language model. auto "
        "is packed for BLOOM on the CPU, else padded.",
    )
    stream_base: bool = option(
        False,
        "Read the blocks of a BLOOM from its safetensors files as they are computed with, and hold two of them at a "
        "time: for a base larger than memory. Larger steps are read for less often. No answers to held-out rows.",
    )
    shard_base: bool = option(
        False,
        "Under torchrun: share the blocks of a BLOOM out among the processes (torch's fully_shard), each reading its "
        "own slices from the safetensors files: for a base larger than a device.",
    )
    max_activation_gib: float = option(
        1.0,
        "--stream_base and --shard_base, packed engine: memory for what a step has at the borders of blocks; what is "
        "beyond goes to a file.",
    )
    offload_folder: str | None = option(
        None, "Where that file is made, on a real disk. (default: the system's folder for such files)"
    )
    load_in_8bit: bool = option(
        False, "Hold the linear layers of a BLOOM's blocks in 8 bit (bitsandbytes' int8 rows); on the packed engine."
    )
    load_in_4bit: bool = option(False, "The same in 4 bit (NF4 in blocks of 64).")
    print_model: bool = option(False, "Print the module tree: the prompt beside the frozen base.")


@dataclass(frozen=True)
class DataArguments:
    _argument_group_name: ClassVar[str] = "data"

    dataset: str | None = option(
        None,
        "A .json, .jsonl, .csv or .parquet file, a folder of .jsonl or .parquet files or for Dataset.load_from_disk, a "
        "hub id, or mini:TASK for a task of the package's own base.",
    )
    dataset_config_name: str | None = option(None, "Configuration of a hub dataset that has several.")
    dataset_split: str = option("train", "Split of a hub dataset or a DatasetDict folder.")
    columns: str | None = option(
        None, "Other column names, as OURS=THEIRS pairs: instruction=question,output=answer. (default: the same names)"
    )
    template: str | None = option(
        None,
        "Prompt text: a format string over the columns ('Q: {instruction}\\nA: '), or `chat` for the tokenizer's chat "
        "template. (default: 'Human: {instruction}\\n{input}\\n\\nAssistant: ', stripped as the article does)",
    )
    max_length: int = option(256, "Tokens of a row, prompt and answer together; what is longer is cut.")
    truncation_side: Literal["output", "input"] = option(
        "output", "Where a row that is too long is cut: at its end (output), or in its input, so the answer is kept."
    )
    overwrite_cache: bool = option(False, "Tokenise anew where the cache of token ids has these rows.")
    streaming: bool = option(
        False,
        "Read --dataset (.jsonl, .parquet, folders of these or of Dataset.save_to_disk, hub ids) while training, "
        "without ever holding the whole of it. Token ids are not cached.",
    )
    buffer_size: int = option(
        DEFAULT_BUFFER_SIZE, "--streaming: rows among which the next is drawn at random; 1 keeps the dataset's order."
    )
    eval_dataset: str | None = option(None, "Held-out rows, in any form that --dataset takes.")
    eval_rows: int = option(0, "Hold out this many rows from the end of --dataset (--streaming: its beginning).")


@dataclass(frozen=True)
class PromptTuningArguments:
    _argument_group_name: ClassVar[str] = "soft prompt"

    num_virtual_tokens: int | None = option(
        None, f"Length of the prompt. (default: {DEFAULT_NUM_VIRTUAL_TOKENS}; for TEXT the length of the text)"
    )
    prompt_tuning_init: Literal["RANDOM", "TEXT", "SAMPLE_VOCAB", "CLASS_LABELS"] = option(
        "RANDOM",
        "Start from unit-variance noise, from the embeddings of a text, from those of random words, or from those of "
        "class labels and random words.",
    )
    prompt_tuning_init_text: str | None = option(
        None, "The text for TEXT, cut or repeated to --num_virtual_tokens where that is given."
    )
    class_labels: str | None = option(
        None, "The labels for CLASS_LABELS, joined by commas: a token each, the mean of its sub-words' embeddings."
    )
    vocab_population: int | None = option(
        None,
        "Draw random words from this many of the most frequent ones, none twice. (default: from the whole vocabulary, "
        f"as PEFT does; beside class labels {DEFAULT_VOCAB_POPULATION:,})",
    )
    init_adapter: str | None = option(None, "Start from the prompt saved in this adapter folder (ours or PEFT's).")


@dataclass(frozen=True)
class TrainingArguments:
    _argument_group_name: ClassVar[str] = "training"

    output_dir: str | None = option(None, "Where the run is written. (default: a new runs/<preset>-<time>)")
    dry_run: bool = option(
        False, "Say what the run would do, its memory and its time from a few measured steps; write nothing."
    )
    max_time: str | None = option(
        None, "Save and stop after this long: 3h30m, 45m, or minutes; --resume_from_checkpoint goes on."
    )
    resume_from_checkpoint: str | None = option(
        None,
        "Go on from this checkpoint-N, or from the newest whole one of this run; without a value, of --output_dir. All "
        "settings are the checkpoint's unless they are given.",
    )
    ignore_data_skip: bool = option(
        False, "Resume although the content of dataset, tokenizer or base is not what the checkpoint was trained with."
    )
    overwrite_output_dir: bool = option(False, "Write into an output_dir that holds a run, over its files.")
    per_device_train_batch_size: int = option(
        4, "Rows of a micro-batch; times --gradient_accumulation_steps, the rows of an optimizer step."
    )
    gradient_accumulation_steps: int = option(8, "Micro-batches of an optimizer step.")
    tokens_per_microbatch: int | None = option(
        None,
        "Real tokens that the packed engine takes at once: speed and memory, not the result. (default: auto, from the "
        "base, dtype, prompt and the device's memory)",
    )
    gradient_checkpointing: bool = option(
        False, "Packed engine: keep only the blocks' inputs and compute the rest again in the backward pass."
    )
    num_train_epochs: float = option(1.0, "Passes over the training rows.")
    max_steps: int = option(
        -1,
        "Optimizer steps; overrides --num_train_epochs where it is positive. Needed with --streaming where a hub "
        "dataset does not say how many rows it has.",
    )
    learning_rate: float | None = option(
        None,
        "Peak learning rate. (default: " + ", ".join(f"{v:g} for {k}" for k, v in DEFAULT_LEARNING_RATES.items()) + ")",
    )
    find_learning_rate: bool = option(
        False,
        "Take the peak learning rate that a short sweep on training rows finds before the first step; where it finds "
        "none, it says so and the default is taken.",
    )
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = option("linear", "Schedule, as in transformers.get_scheduler.")
    warmup_steps: float = option(0, "Warm-up steps; below 1, a share of all steps (as in transformers 5).")
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay.")
    adam_beta1: float = option(0.9, "AdamW's beta1.")
    adam_beta2: float = option(0.999, "AdamW's beta2.")
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = option(1.0, "Clip the gradient's norm to this; 0 does not clip.")
    seed: int = option(42, "Seeds the prompt's first values and the order of the rows.")
    deterministic: bool = option(
        False, "Only algorithms that give the same bytes each time, on CUDA too; slower there. (docs/never-lost.md)"
    )
    logging_steps: int = option(10, "Log every N optimizer steps.")
    save_steps: int = option(500, "Write checkpoint-N/ every N optimizer steps, and at the last one.")
    save_total_limit: int | None = option(None, "Keep only the newest N checkpoints, and the best. (default: all)")
    eval_strategy: Literal["no", "steps", "epoch"] = option("no", "Evaluate held-out rows during training, too.")
    eval_steps: int | None = option(None, "Evaluate every N optimizer steps. (default: --logging_steps)")
    per_device_eval_batch_size: int = option(8, "Rows of a batch in evaluation.")
    load_best_model_at_end: bool = option(
        False, "Save each prompt that is evaluated as the best so far, and end with the best of all."
    )
    metric_for_best_model: Literal[
        "loss", "eval_loss", "perplexity", "eval_perplexity", "exact_match", "eval_exact_match"
    ] = option("eval_loss", "What is best by, and what --early_stopping_patience waits for.")
    greater_is_better: bool | None = option(None, "Whether more of that is better. (default: of exact match alone)")
    early_stopping_patience: int | None = option(
        None, "End the run when so many evaluations in a row were no better than the best before them."
    )
    early_stopping_threshold: float = option(0.0, "Gains of no more than this are none to that patience.")


GROUPS = (ModelArguments, DataArguments, PromptTuningArguments, TrainingArguments, SharingArguments)

_BLOOM = {"model_name_or_path": "Langboat/bloom-1b4-zh", "dataset": "alpaca_data_zh"}
PRESETS: dict[str, dict[str, Any]] = {
    "mini": {
        "model_name_or_path": "mini",
        "dataset": "mini:sentiment",
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 50,
        "gradient_accumulation_steps": 1,
    },
    "bloom-1b4-zh": _BLOOM,
    "article": {**_BLOOM, "learning_rate": 5e-5},
}


@dataclass(frozen=True)
class TrainConfig:
    """One run. `preset` is None where base and dataset were both named without one."""

    preset: str | None
    model: ModelArguments
    data: DataArguments
    prompt: PromptTuningArguments
    training: TrainingArguments
    sharing: SharingArguments = dataclasses.field(default_factory=SharingArguments)
    given: Mapping[str, Any] = dataclasses.field(
        default_factory=dict, compare=False, repr=False
    )  # what was set by hand, under its flag's name

    @property
    def learning_rate(self) -> float:
        """The peak learning rate: as given, else the default of the way the prompt starts."""
        given = self.training.learning_rate
        return DEFAULT_LEARNING_RATES[self.prompt.prompt_tuning_init] if given is None else given

    @property
    def columns(self) -> dict[str, str]:
        return parse_columns(self.data.columns)

    def as_dict(self) -> dict[str, Any]:
        """Every setting under its flag's name but for secrets, JSON-able."""
        flat = {"preset": self.preset}
        for part in (self.model, self.data, self.prompt, self.training, self.sharing):
            flat |= dataclasses.asdict(part)
        return {name: value for name, value in flat.items() if name not in SECRETS}


def preset_of(preset: str | None, given: dict[str, Any]) -> str | None:
    """The preset that a call runs under: the one it names, else `mini` unless it names a base of its own."""
    if preset is not None and str(preset) not in PRESETS:
        hint = nearest(str(preset), PRESETS)
        raise ConfigError(f"unknown preset {preset!r}, expected one of {', '.join(PRESETS)}{hint}")
    return preset or (None if given.get("model_name_or_path") else "mini")


def train_config(preset: str | None = None, **given: Any) -> TrainConfig:
    """Settings from keyword arguments under the flags' names, over the preset's, over the defaults.

    Raises:
        ConfigError: an unknown preset or field, a value of a wrong type or out of range, settings that contradict
            each other; every fault is in the one message.
    """
    for name in SECRETS:
        if given.get(name):
            hide(str(given[name]))
    preset = preset_of(preset, given)
    values = {**(PRESETS[preset] if preset else {}), **given}
    if values.get("eval_steps") not in (None, AUTO):
        values.setdefault("eval_strategy", "steps")
    parts = build(GROUPS, values)
    config = TrainConfig(preset, *parts, given)
    if faults := list(_faults(config)):
        raise ConfigError("; ".join(faults))
    return config


def parse_columns(text: str | None) -> dict[str, str]:
    """`instruction=question,output=answer` → {"instruction": "question", "output": "answer"}."""
    pairs = [pair.split("=", 1) for pair in (text or "").split(",") if pair.strip()]
    if any(len(pair) != 2 or not all(side.strip() for side in pair) for pair in pairs):
        raise ConfigError(
            f"--columns {text!r} is not a list of OURS=THEIRS pairs such as instruction=question,output=answer"
        )
    return {ours.strip(): theirs.strip() for ours, theirs in pairs}


def precision_faults(bf16: bool | None, fp16: bool | None, device: str) -> list[str]:
    faults = []
    if bf16 and fp16:
        faults.append("--bf16 and --fp16 exclude each other; give one of them")
    if not re.fullmatch(r"auto|cpu|cuda(:(0|[1-9]\d{0,2}))?", device):
        faults.append(f"--device {device!r} is not auto, cpu, cuda or cuda:N")
    return faults


def bits_of(load_in_8bit: bool, load_in_4bit: bool) -> int | None:
    """Of a weight of a quantised base."""
    return 8 if load_in_8bit else 4 if load_in_4bit else None


def bits_faults(load_in_8bit: bool, load_in_4bit: bool, engine: str) -> list[str]:
    """What is wrong with a base in 8 or 4 bit."""
    if load_in_8bit and load_in_4bit:
        return ["--load_in_8bit and --load_in_4bit exclude each other"]
    if engine == "padded" and (load_in_8bit or load_in_4bit):
        return ["--load_in_8bit and --load_in_4bit are for the packed engine; leave --engine padded out"]
    return []


def seed_faults(seed: int) -> list[str]:
    return [] if 0 <= seed < 2**63 else [f"--seed {seed} must lie in [0, 2**63)"]


def parse_labels(text: str) -> list[str]:
    """`正面,负面` → ["正面", "负面"]."""
    return [label.strip() for label in text.split(",")]


def _prompt_faults(prompt: PromptTuningArguments) -> Iterator[str]:
    init, wanted = prompt.prompt_tuning_init, prompt.num_virtual_tokens
    if wanted is not None and wanted < 1:
        yield f"--num_virtual_tokens {wanted} is below 1; a soft prompt needs at least one token"
    if init == "TEXT" and not prompt.prompt_tuning_init_text and not prompt.init_adapter:
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
            yield f"--class_labels {prompt.class_labels!r} holds an empty label, or one twice; give each once"
        elif len(labels) > tokens:
            yield f"--class_labels has {len(labels)} labels for {tokens} virtual tokens; raise --num_virtual_tokens"
    if prompt.vocab_population is not None:
        if prompt.vocab_population < 1:
            yield f"--vocab_population {prompt.vocab_population} must be above 0"
        if init not in ("SAMPLE_VOCAB", "CLASS_LABELS"):
            yield "--vocab_population is only used with --prompt_tuning_init SAMPLE_VOCAB or CLASS_LABELS"


def _faults(config: TrainConfig) -> Iterator[str]:
    model, data, prompt, training = config.model, config.data, config.prompt, config.training
    yield from precision_faults(model.bf16, model.fp16, model.device)
    for name, text in config.as_dict().items():
        if text == "":
            yield f"--{name} is empty; give it a value or leave it out"
        elif isinstance(text, str) and "\0" in text:
            yield f"--{name} {text!r} holds a null character; leave that out"
    if data.dataset is None:
        yield "--dataset is missing; name the rows to train on (a file, a folder, a hub id or mini:TASK)"
    yield from _prompt_faults(prompt)
    if data.eval_dataset and data.eval_rows:
        yield "--eval_dataset and --eval_rows exclude each other; give one of them"
    if data.buffer_size != DEFAULT_BUFFER_SIZE and not data.streaming:
        yield "--buffer_size is only used with --streaming; add that flag"
    if not 0 < data.buffer_size <= MOST_BUFFERED:
        yield f"--buffer_size {data.buffer_size} must lie in [1, {MOST_BUFFERED:,}]"
    if data.streaming and str(data.dataset).startswith("mini:"):
        yield f"--streaming: {data.dataset} is made in memory; name a file, a folder or a hub id, or leave the flag out"
    if training.eval_strategy != "no" and not (
        data.eval_dataset or data.eval_rows or str(data.dataset).startswith("mini:")
    ):
        yield f"--eval_strategy {training.eval_strategy} needs held-out rows; give --eval_dataset FILE or --eval_rows N"
    unknown = training.resume_from_checkpoint and "eval_strategy" not in config.given  # the checkpoint says it
    for name in ("load_best_model_at_end", "early_stopping_patience"):
        if getattr(training, name) and training.eval_strategy == "no" and not unknown:
            yield f"--{name} needs evaluations during training; add --eval_strategy epoch or --eval_steps N"
    if training.early_stopping_threshold and training.early_stopping_patience is None and not unknown:
        yield "--early_stopping_threshold is only used with --early_stopping_patience N; add that flag"
    yield from bits_faults(model.load_in_8bit, model.load_in_4bit, model.engine)
    if (model.stream_base or model.shard_base) and (model.load_in_8bit or model.load_in_4bit):
        yield "--load_in_8bit and --load_in_4bit are for a base held whole, not for --stream_base or --shard_base"
    if model.engine == "padded" and model.stream_base:
        yield "--stream_base is for the packed engine; leave --engine padded out"
    if model.stream_base and model.shard_base:
        yield "--stream_base and --shard_base exclude each other: a block comes from the disk or from the other ranks"
    if not (model.stream_base or model.shard_base) and model.offload_folder:
        yield "--offload_folder is only used with --stream_base or --shard_base; add one of them"
    if not model.max_activation_gib >= 0:
        yield f"--max_activation_gib {model.max_activation_gib} must not be negative"
    if model.engine == "padded":
        for name in ("tokens_per_microbatch", "gradient_checkpointing"):
            if getattr(training, name):
                yield f"--{name} is a setting of the packed engine; leave it out, or leave --engine padded out"
    positive = ("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps", "save_steps")
    positive += ("per_device_eval_batch_size", "tokens_per_microbatch", "save_total_limit", "eval_steps")
    positive += ("early_stopping_patience",)
    for name in (*positive, "num_train_epochs"):
        value = getattr(training, name)
        if value is not None and not value > 0:
            yield f"--{name} {value} must be above 0"
    for name in ("warmup_steps", "weight_decay", "max_grad_norm", "adam_epsilon", "early_stopping_threshold"):
        if not getattr(training, name) >= 0:
            yield f"--{name} {getattr(training, name)} must not be negative"
    yield from seed_faults(training.seed)
    yield from sharing_faults(config.sharing, bool(training.resume_from_checkpoint))
    limits = {"num_virtual_tokens": prompt.num_virtual_tokens, "num_train_epochs": training.num_train_epochs}
    for name, value in {**limits, "max_steps": training.max_steps}.items():
        most = 1_000_000_000 if name == "max_steps" else 100_000
        if value is not None and value > most:
            yield f"--{name} {value} is above {most:,}, more than anything could learn from"
    if training.max_time:
        try:
            seconds_of(training.max_time)
        except ConfigError as error:
            yield str(error)
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(training, name) < 1:
            yield f"--{name} {getattr(training, name)} must lie in [0, 1)"
    if training.find_learning_rate and "learning_rate" in config.given:
        yield "--find_learning_rate and --learning_rate exclude each other; give one of them"
    if not config.learning_rate > 0:
        yield f"--learning_rate {config.learning_rate} must be above 0"
    if data.max_length < 2:
        yield f"--max_length {data.max_length} is too small to hold any target; at least 2"
    if data.eval_rows < 0:
        yield f"--eval_rows {data.eval_rows} must not be negative"
    try:
        parse_columns(data.columns)
    except ConfigError as error:
        yield str(error)
