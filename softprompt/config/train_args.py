"""Settings of a training run: one frozen dataclass per group of `--help`, named as in PEFT and TrainingArguments."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from softprompt.config.schema import option

Reparameterization = Literal["none", "mlp"]
RUNS = Path("runs")  # the folder of runs that are not given an --output_dir
# The learning rates were chosen by the sweeps in docs/learning-rate.md. A prompt needs steps in proportion to its
# values. Those of a RANDOM one have unit variance; the other initializations start on word embeddings, whose size
# depends on the base.
RANDOM_LEARNING_RATE = 3e-1
# Multiples of the root mean square of the base's word embeddings; the second one is for distillation.
RELATIVE_LEARNING_RATE, RELATIVE_DISTILLATION_RATE = 0.22, 0.15
MLP_LEARNING_RATE = 3e-3  # with --prompt_reparameterization mlp
DEFAULT_NUM_VIRTUAL_TOKENS = 10
DEFAULT_VOCAB_POPULATION = 5000  # for the words after class labels, as in google-research/prompt-tuning
NEWEST = "newest"  # stands for --resume_from_checkpoint without a value
SECRETS = ("hub_token",)  # settings that are never written to a file, a message or a log


def default_learning_rate(
    init: str, reparameterization: str = "none", word_rms: float | None = None, distills: bool = False
) -> float | None:
    """Return the default peak learning rate.

    Args:
        init: The value of --prompt_tuning_init.
        reparameterization: The value of --prompt_reparameterization.
        word_rms: The root mean square of the base's word embeddings. Without it, the result is None where the default
            depends on it.
        distills: Whether a text is distilled.
    """
    if reparameterization != "none":
        return MLP_LEARNING_RATE
    if init == "RANDOM":
        return RANDOM_LEARNING_RATE
    if word_rms is None:
        return None
    relative = RELATIVE_DISTILLATION_RATE if distills else RELATIVE_LEARNING_RATE
    return float(f"{relative * word_rms:.0e}")  # one significant digit


@dataclass(frozen=True)
class ModelArguments:
    """The frozen base: its name, device, precision and engine, and how it is held in memory."""

    _argument_group_name: ClassVar[str] = "base model"
    _everyday: ClassVar[tuple[str, ...]] = ("model_name_or_path", "device")

    model_name_or_path: str | None = option(
        None,
        "Train a prompt for this base model: a local folder, a hub id such as Langboat/bloom-1b4-zh, or `mini`, the "
        "small model in this package. (default: the preset's)",
        "BASE",
    )
    device: str = option(
        "auto", "Compute on cpu, cuda or cuda:N; auto takes CUDA if there is a GPU, else the CPU.", "DEVICE"
    )
    bf16: bool | None = option(
        None,
        "Compute in bf16 autocast; `--bf16 false` computes in fp32. (default: true on a GPU that supports bf16, else "
        "false)",
    )
    fp16: bool | None = option(
        None,
        "Compute in fp16 autocast with a GradScaler; `--fp16 false` computes in fp32. (default: true on a GPU without "
        "bf16, else false)",
    )
    engine: Literal["auto", "packed", "padded"] = option(
        "auto",
        "Choose the forward and backward pass. packed: rows without padding, with the prompt computed once per step; "
        "padded: the base model's own forward over padded rows, for any causal language model; auto: packed if its "
        "losses and gradient on a few training rows agree with those of padded and it is not clearly slower, else "
        "padded. If packed is given and its losses or gradient do not agree, the run is refused.",
    )
    attn_implementation: Literal["auto", "sdpa", "varlen", "flex_attention"] = option(
        "auto",
        "Choose what computes attention in the packed engine. sdpa: torch's scaled_dot_product_attention, on any "
        "device; varlen: torch's variable-length kernel, on CUDA in bf16 or fp16; flex_attention: torch's "
        "FlexAttention, on CUDA, also for BLOOM's ALiBi and for soft caps; auto: on CUDA in bf16 or fp16, the fastest "
        "one that passes the check of --engine, else sdpa.",
    )
    stream_base: bool = option(
        False,
        "Hold only two transformer blocks of a BLOOM in memory and read the others from its safetensors files when "
        "they are needed, for a base larger than memory. The larger the step, the less often the base is re-read. "
        "Answers to held-out rows are then not generated, so their exact match is not measured.",
    )
    shard_base: bool = option(
        False,
        "Shard the layers of the base among the processes of torchrun (torch's fully_shard), for a base larger than "
        "one device. Each process reads only its own slices of them from the safetensors files.",
    )
    max_activation_gib: float = option(
        1.0,
        "Keep at most this many GiB of block inputs in memory and offload the others to a file. Used by the packed "
        "engine for a BLOOM with --stream_base, --shard_base, --load_in_8bit or --load_in_4bit.",
        "GIB",
    )
    offload_folder: str | None = option(
        None,
        "Create the file of --max_activation_gib in this folder, which should be on a real disk. (default: the "
        "system's folder for temporary files)",
        "DIR",
    )
    load_in_8bit: bool = option(
        False, "Quantize the base's linear layers to 8 bits while it loads (bitsandbytes int8)."
    )
    load_in_4bit: bool = option(
        False,
        "Quantize the base's linear layers to 4 bits while it loads (bitsandbytes NF4 in blocks of 64).",
    )
    print_model: bool = option(False, "Print the module tree of the prompt and the frozen base.")


@dataclass(frozen=True)
class PromptTuningArguments:
    """The prompt and its initial value, named as in PEFT's PromptTuningConfig."""

    _argument_group_name: ClassVar[str] = "soft prompt"
    _everyday: ClassVar[tuple[str, ...]] = (
        *("num_virtual_tokens", "prompt_tuning_init", "prompt_tuning_init_text", "init_adapter"),
    )

    num_virtual_tokens: int | None = option(
        None,
        f"Learn this many virtual tokens. (default: {DEFAULT_NUM_VIRTUAL_TOKENS}; with TEXT the length of the text)",
    )
    prompt_tuning_init: Literal["RANDOM", "TEXT", "SAMPLE_VOCAB", "CLASS_LABELS"] = option(
        "SAMPLE_VOCAB",
        "Initialize the prompt with unit-variance noise (RANDOM), or with the embeddings of a text (TEXT), of random "
        "words (SAMPLE_VOCAB), or of class labels followed by random words (CLASS_LABELS).",
    )
    prompt_tuning_init_text: str | None = option(
        None,
        "Initialize with this text if --prompt_tuning_init is TEXT; it is truncated or repeated to "
        "--num_virtual_tokens if that is given. (default: none)",
        "TEXT",
    )
    class_labels: str | None = option(
        None,
        "Initialize with these comma-separated labels if --prompt_tuning_init is CLASS_LABELS: one virtual token each, "
        "the mean of its sub-word embeddings. (default: none)",
        "A,B",
    )
    vocab_population: int | None = option(
        None,
        "Draw the random words from this many of the most frequent ones, each at most once. (default: the whole "
        f"vocabulary, as in PEFT; with CLASS_LABELS {DEFAULT_VOCAB_POPULATION:,})",
    )
    init_adapter: str | None = option(
        None, "Start from the prompt in this adapter folder, written by softprompt or by PEFT. (default: none)", "DIR"
    )
    prompt_reparameterization: Reparameterization = option(
        "none",
        "While training, compute the prompt with an MLP, which is trained instead of it (mlp, as in P-tuning). The "
        "saved adapter is a plain prompt.",
    )
    encoder_hidden_size: int | None = option(
        None,
        "With --prompt_reparameterization mlp, use this size of the MLP's hidden layers. (default: the base's hidden "
        "size)",
    )


@dataclass(frozen=True)
class TrainingArguments:
    """The run: steps, optimizer, checkpoints, evaluations, named as in transformers' TrainingArguments."""

    _argument_group_name: ClassVar[str] = "training"
    _everyday: ClassVar[tuple[str, ...]] = (
        *("output_dir", "dry_run", "resume_from_checkpoint", "max_time", "num_train_epochs", "max_steps"),
        *("per_device_train_batch_size", "learning_rate", "find_learning_rate", "eval_steps", "save_steps", "seed"),
    )

    output_dir: str | None = option(
        None, "Write the run to this folder. (default: a new runs/BASE-DATASET-TIME)", "DIR"
    )
    dry_run: bool = option(
        False,
        "Print what the run would do, and its memory and time, estimated from a few measured steps; write nothing.",
    )
    max_time: str | None = option(
        None,
        "Save and stop after this time, such as 3h30m, 45m, 90s, or a number of minutes; --resume_from_checkpoint "
        "continues. (default: no limit)",
        "TIME",
    )
    resume_from_checkpoint: str | None = option(
        None,
        "Continue from this checkpoint-N folder, or from the newest complete checkpoint in this run's folder; without "
        "a value, in --output_dir. Settings that are not given are taken from the checkpoint; every difference is "
        "reported. (default: start a new run)",
        "DIR",
    )
    ignore_data_skip: bool = option(
        False,
        "Resume even if the content of the dataset, held-out rows, tokenizer or base, or the order or length of the "
        "rows, differs from that of the checkpoint. Some rows of the epoch may then be repeated or skipped.",
    )
    overwrite_output_dir: bool = option(
        False, "Write to an --output_dir that already holds a run, and replace the files of that run."
    )
    per_device_train_batch_size: int = option(
        4,
        "Take this many rows times --gradient_accumulation_steps times the number of devices for an optimizer step. "
        "--tokens_per_microbatch determines how many of them are computed at once.",
    )
    gradient_accumulation_steps: int = option(
        8, "Multiply the rows of an optimizer step by this; see --per_device_train_batch_size."
    )
    tokens_per_microbatch: int | None = option(
        None,
        "Compute up to this many tokens at once, or one longer row. The padded engine also counts padding and virtual "
        "tokens. Affects speed and memory, not the result except for rounding. (default: computed from the base, the "
        "dtype and the device's memory)",
    )
    gradient_checkpointing: bool = option(
        False,
        "To save memory, keep only the inputs of the base's layers; recompute other activations in the backward pass.",
    )
    num_train_epochs: float = option(1.0, "Train for this many passes over the training rows.")
    max_steps: int = option(
        -1,
        "Train for this many optimizer steps, if positive, instead of --num_train_epochs. Required with --streaming if "
        "the number of rows of a hub dataset is unknown. (default: -1, which leaves it to --num_train_epochs)",
    )
    learning_rate: float | None = option(
        None,
        f"Use this peak learning rate. (default: {RANDOM_LEARNING_RATE:g} for RANDOM; for the other initial prompts "
        f"{RELATIVE_LEARNING_RATE:g} times, with --distill_prompt or --distill_context "
        f"{RELATIVE_DISTILLATION_RATE:g} times the root mean square of the base's word embeddings, rounded to one "
        "significant digit; "
        f"with --prompt_reparameterization mlp, {MLP_LEARNING_RATE:g})",
        "RATE",
    )
    find_learning_rate: bool = option(
        False,
        "Before the first step, choose the peak learning rate by a short sweep on training rows (with --streaming, the "
        "first of them). If the sweep finds none, this is reported and the default is used.",
    )
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = option("linear", "Change the learning rate by this schedule of transformers.get_scheduler.")
    warmup_steps: float = option(
        0,
        "Warm the learning rate up over this many steps; below 1, it is a share of all steps, as in transformers 5.",
    )
    weight_decay: float = option(0.0, "Set AdamW's decoupled weight decay.")
    adam_beta1: float = option(0.9, "Set AdamW's beta1.")
    adam_beta2: float = option(0.999, "Set AdamW's beta2.")
    adam_epsilon: float = option(1e-8, "Set AdamW's epsilon.")
    max_grad_norm: float = option(1.0, "Clip the gradient to this norm; 0 does not clip.")
    seed: int = option(42, "Seed the prompt's initial values and the order of the rows.")
    deterministic: bool = option(
        False,
        "Use only algorithms that give identical bytes each time. On CUDA they are slower. See docs/never-lost.md.",
    )
    logging_steps: int = option(10, "Log every N optimizer steps.")
    save_steps: int = option(500, "Write checkpoint-N/ every N optimizer steps, and after the last step.")
    save_total_limit: int | None = option(
        None, "Keep only the newest N checkpoints, and the best one. (default: keep all)"
    )
    eval_strategy: Literal["no", "steps", "epoch"] = option(
        "no",
        "Also evaluate the held-out rows during training, every --eval_steps or after every epoch. They are always "
        "evaluated before and after training.",
    )
    eval_steps: int | None = option(
        None, "Evaluate every N optimizer steps, which implies --eval_strategy steps. (default: --logging_steps)"
    )
    per_device_eval_batch_size: int = option(8, "Put this many rows into an evaluation batch.")
    load_best_model_at_end: bool = option(
        False, "Save the prompt whenever an evaluation is the best so far, and end the run with the best prompt."
    )
    metric_for_best_model: Literal[
        "loss",
        "eval_loss",
        "perplexity",
        "eval_perplexity",
        "exact_match",
        "eval_exact_match",
        "accuracy",
        "eval_accuracy",
        "macro_f1",
        "eval_macro_f1",
        "kl",
        "eval_kl",
        "agreement",
        "eval_agreement",
    ] = option("eval_loss", "Compare evaluations by this metric, for the best prompt and for early stopping.")
    greater_is_better: bool | None = option(
        None, "Treat a larger metric as better. (default: false for loss, perplexity and kl, else true)"
    )
    early_stopping_patience: int | None = option(
        None, "Stop after N consecutive evaluations without improvement. (default: no early stopping)"
    )
    early_stopping_threshold: float = option(
        0.0, "For early stopping, count an evaluation as an improvement only if the metric improves by more than this."
    )


@dataclass(frozen=True)
class SharingArguments:
    """Logs for TensorBoard and the upload to the hub."""

    _argument_group_name: ClassVar[str] = "logging and sharing"
    _everyday: ClassVar[tuple[str, ...]] = ("report_to", "push_to_hub", "hub_model_id")

    report_to: Literal["none", "tensorboard"] = option(
        "none",
        "Also write the metrics for TensorBoard, to OUTPUT_DIR/runs; show them with `tensorboard --logdir`. Needs "
        "`pip install tensorboard`.",
    )
    push_to_hub: bool = option(
        False,
        "After the run, upload its adapter, model card and report (which show some rows) to the hub. If that fails, "
        "the run is kept, the exit code is 1, and a message says how to upload it later.",
    )
    hub_model_id: str | None = option(
        None,
        "Upload to this repository, NAME or OWNER/NAME. (default: the name of --output_dir, owned by the token's user)",
        "REPO",
    )
    hub_private_repo: bool | None = option(
        None, "Make a new repository private. (default: the owner's setting, which is usually public)"
    )
    hub_token: str | None = option(
        None,
        "Authenticate with this token, which is never written anywhere. (default: HF_TOKEN, else the token of `hf auth "
        "login`)",
        "TOKEN",
        secret=True,
    )
