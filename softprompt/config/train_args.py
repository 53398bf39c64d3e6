"""Settings of a training run: one frozen dataclass per group of `--help`, named as in PEFT and TrainingArguments."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from softprompt.config.schema import option

# Chosen by the sweeps that README.md quotes ("The learning rate"). A RANDOM prompt has unit variance and needs steps
# that are visible beside 1; the others start on word embeddings, which are smaller.
DEFAULT_LEARNING_RATES = {"RANDOM": 3e-2, "TEXT": 1e-2, "SAMPLE_VOCAB": 1e-2, "CLASS_LABELS": 1e-2}
DEFAULT_NUM_VIRTUAL_TOKENS = 10
DEFAULT_MAX_LENGTH = 256
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
        "--stream_base, --shard_base, --load_in_8bit and --load_in_4bit, packed engine: memory for what a step has at "
        "the borders of blocks; what is beyond goes to a file.",
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
        "A .json, .jsonl, .csv or .parquet file, a folder of such files or for Dataset.load_from_disk, a hub id, or "
        "mini:TASK for a task of the package's own base.",
    )
    dataset_config_name: str | None = option(None, "Configuration of a hub dataset that has several.")
    dataset_split: str = option(
        "train",
        "Split of a hub dataset, of a DatasetDict folder, or of a folder of files that are named for splits "
        "(train-00000-of-00002.parquet, data/test.jsonl), or slices of splits: train[:1000], train[:90%].",
    )
    columns: str | None = option(
        None,
        "Other column names, as OURS=THEIRS pairs: instruction=question,output=answer, or as a JSON object, for names "
        "with a comma. (default: the same names)",
    )
    template: str | None = option(
        None,
        "Prompt text: a format string over the columns ('Q: {instruction}\\nA: '), or `chat` for the tokenizer's chat "
        "template. (default: 'Human: {instruction}\\n{input}\\n\\nAssistant: ', stripped as the article does)",
    )
    max_length: int = option(DEFAULT_MAX_LENGTH, "Tokens of a row, prompt and answer together; what is longer is cut.")
    truncation_side: Literal["output", "input"] = option(
        "output", "Where a row that is too long is cut: at its end (output), or in its input, so the answer is kept."
    )
    overwrite_cache: bool = option(False, "Tokenise anew where the cache of token ids has these rows.")
    preprocessing_num_workers: int | None = option(
        None, "Number of processes that tokenise the rows before training; the result is the same. (default: 1)"
    )
    streaming: bool = option(
        False,
        "Read --dataset (.jsonl, .parquet, folders of these or of Dataset.save_to_disk, hub ids) while training, "
        "without ever holding the whole of it. Token ids are not cached.",
    )
    buffer_size: int = option(
        DEFAULT_BUFFER_SIZE, "--streaming: rows among which the next is drawn at random; 1 keeps the dataset's order."
    )
    eval_dataset: str | None = option(
        None, "Held-out rows, in any form that --dataset takes. (default with --eval_split: --dataset)"
    )
    eval_split: str | None = option(
        None,
        "Split of --eval_dataset, as for --dataset_split. (default, where it has several: validation, else test)",
    )
    eval_rows: int = option(0, "Hold out this many rows from the end of --dataset (--streaming: its beginning).")

    @property
    def held_out(self) -> str | None:
        """The dataset that held-out rows are read from, unless they are of --eval_rows."""
        made = str(self.dataset).startswith("mini:")  # its tasks have held-out rows of their own
        return self.eval_dataset or (self.dataset if self.eval_split or made else None)


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
        "settings are the checkpoint's unless they are given; each that differs is told.",
    )
    ignore_data_skip: bool = option(
        False,
        "Resume although the content of dataset, held-out rows, tokenizer or base, or the order or length of the rows, "
        "is not what the checkpoint was trained with. Some rows of the pass may then be repeated or left out.",
    )
    overwrite_output_dir: bool = option(False, "Write into an output_dir that holds a run, over its files.")
    per_device_train_batch_size: int = option(
        4,
        "Rows of a micro-batch on each device; times --gradient_accumulation_steps and the number of devices, the rows "
        "of an optimizer step.",
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
        "Take the peak learning rate that a short sweep on training rows (--streaming: the first of them) finds before "
        "the first step; where it finds none, it says so and the default is taken.",
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


SECRETS = ("hub_token",)  # no file, no message and no log has them


@dataclass(frozen=True)
class SharingArguments:
    _argument_group_name: ClassVar[str] = "telling others"

    report_to: Literal["none", "tensorboard"] = option(
        "none", "tensorboard: the metrics in OUTPUT_DIR/runs too, for `tensorboard --logdir`. (pip install tensorboard)"
    )
    push_to_hub: bool = option(
        False,
        "When the run is whole, upload adapter, model card and report (which shows some rows) to the hub. Where that "
        "fails the run is kept, the exit code is 1, and a line says how to upload it later.",
    )
    hub_model_id: str | None = option(
        None, "Repository on the hub: NAME or OWNER/NAME. (default: the name of --output_dir, of the token's owner)"
    )
    hub_private_repo: bool | None = option(
        None, "Make a new repository private. (default: as its owner has set; public for most)"
    )
    hub_token: str | None = field(
        default=None,
        repr=False,
        metadata={"help": "Token for the hub; written nowhere. (default: that of HF_TOKEN or `hf auth login`)"},
    )


def sharing_faults(sharing: SharingArguments) -> Iterator[str]:
    for name in ("hub_model_id", "hub_private_repo", "hub_token"):
        if getattr(sharing, name) is not None and not sharing.push_to_hub:
            yield f"--{name} is only used with --push_to_hub; add that flag"
    if sharing.hub_token is not None and not sharing.hub_token.strip():
        yield "--hub_token is empty; give a token, or leave it out where HF_TOKEN has one"


RUNS = Path("runs")
