"""Advice about an unknown setting: the setting that is meant, or why a setting of another library has no counterpart
here. A setting with another meaning is never suggested."""

import re
from collections.abc import Iterable
from difflib import SequenceMatcher

# Other common names of our settings. SECOND holds what they mean for commands that lack the setting in ALIASES.
ALIASES = {
    "lr": "learning_rate",
    **dict.fromkeys(("batch_size", "train_batch_size", "per_gpu_train_batch_size"), "per_device_train_batch_size"),
    **dict.fromkeys(("per_gpu_eval_batch_size", "per_device_test_batch_size"), "per_device_eval_batch_size"),
    **dict.fromkeys(("accumulation_steps", "grad_accum", "grad_accumulation_steps"), "gradient_accumulation_steps"),
    **dict.fromkeys(("epoch", "epochs", "num_epochs", "train_epochs"), "num_train_epochs"),
    **dict.fromkeys(("steps", "num_steps", "max_train_steps", "num_train_steps", "total_steps"), "max_steps"),
    **dict.fromkeys(("scheduler", "lr_scheduler", "scheduler_type"), "lr_scheduler_type"),
    **dict.fromkeys(("warmup", "num_warmup_steps", "warmup_ratio"), "warmup_steps"),
    **dict.fromkeys(("wd", "decay"), "weight_decay"),
    **dict.fromkeys(("beta1", "adamw_beta1"), "adam_beta1"),
    **dict.fromkeys(("beta2", "adamw_beta2"), "adam_beta2"),
    **dict.fromkeys(("eps", "epsilon", "adam_eps"), "adam_epsilon"),
    **dict.fromkeys(("clip_grad", "grad_clip", "gradient_clipping", "clip_grad_norm", "grad_norm"), "max_grad_norm"),
    **dict.fromkeys(("model", "model_name", "model_path", "base_model", "base", "base_model_name_or_path", "m"),
                    "model_name_or_path"),
    **dict.fromkeys(("data", "data_path", "data_file", "dataset_name", "dataset_path", "train_file", "train_data",
                     "train_dataset"), "dataset"),
    **dict.fromkeys(("eval_file", "eval_data", "validation_file", "validation_data", "validation_dataset", "test_file",
                     "test_data", "test_dataset", "dev_file"), "eval_dataset"),
    **dict.fromkeys(("split", "train_split"), "dataset_split"),
    **dict.fromkeys(("dataset_config", "subset"), "dataset_config_name"),
    **dict.fromkeys(("max_seq_length", "max_seq_len", "model_max_length", "cutoff_len", "block_size"), "max_length"),
    **dict.fromkeys(("truncation", "truncate_side"), "truncation_side"),
    **dict.fromkeys(("virtual_tokens", "num_tokens", "n_tokens", "prompt_length", "prompt_tokens", "prompt_len",
                     "num_soft_tokens"), "num_virtual_tokens"),
    **dict.fromkeys(("init", "prompt_init", "prompt_tuning_initialization"), "prompt_tuning_init"),
    **dict.fromkeys(("init_text", "prompt_init_text"), "prompt_tuning_init_text"),
    **dict.fromkeys(("labels", "verbalizers"), "class_labels"),
    **dict.fromkeys(("out", "output", "out_dir", "save_dir", "output_path"), "output_dir"),
    **dict.fromkeys(("resume", "resume_from", "checkpoint", "continue"), "resume_from_checkpoint"),
    **dict.fromkeys(("overwrite", "force"), "overwrite_output_dir"),
    **dict.fromkeys(("random_seed", "manual_seed"), "seed"),
    **dict.fromkeys(("full_determinism", "use_deterministic_algorithms"), "deterministic"),
    **dict.fromkeys(("log_steps", "log_every", "log_interval"), "logging_steps"),
    **dict.fromkeys(("save_every", "save_interval", "checkpoint_steps"), "save_steps"),
    **dict.fromkeys(("eval_every", "eval_interval", "evaluation_steps"), "eval_steps"),
    **dict.fromkeys(("evaluation_strategy", "do_eval", "evaluate_during_training"), "eval_strategy"),
    **dict.fromkeys(("patience", "early_stopping"), "early_stopping_patience"),
    **dict.fromkeys(("load_best_model", "load_best"), "load_best_model_at_end"),
    **dict.fromkeys(("best_metric", "metric"), "metric_for_best_model"),
    **dict.fromkeys(("token", "hf_token", "use_auth_token", "push_to_hub_token"), "hub_token"),
    **dict.fromkeys(("push_to_hub_model_id", "repo_id", "hub_repo_id"), "hub_model_id"),
    **dict.fromkeys(("time_limit", "max_hours"), "max_time"),
    **dict.fromkeys(("8bit", "int8", "use_8bit"), "load_in_8bit"),
    **dict.fromkeys(("4bit", "int4", "nf4", "use_4bit"), "load_in_4bit"),
    **dict.fromkeys(("question", "instruction", "text", "q"), "prompt"),
    **dict.fromkeys(("prompts", "prompt_file", "questions_file", "input_file"), "prompts_file"),
    **dict.fromkeys(("adapter_name_or_path", "adapter_path", "peft_model", "lora", "prompt_dir"), "adapter"),
    **dict.fromkeys(("max_tokens", "max_gen_length", "new_tokens", "max_output_tokens"), "max_new_tokens"),
    **dict.fromkeys(("temp",), "temperature"),
    **dict.fromkeys(("beams", "n_beams", "beam_size", "beam_width"), "num_beams"),
    **dict.fromkeys(("n", "best_of", "num_samples"), "num_return_sequences"),
    **dict.fromkeys(("sample", "sampling"), "do_sample"),
    **dict.fromkeys(("stop", "stop_words", "stop_sequences"), "stop_strings"),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "rep_penalty"), "repetition_penalty"),
}  # fmt: skip
SECOND = {"batch_size": "batch_size", "output": "output", "out": "output_file", "out_dir": "output"}  # infer, export
# Patterns of names in transformers' TrainingArguments, GenerationConfig and example scripts and in PEFT, without a
# counterpart here.
REASONS = {
    r"optim(_.*)?|adafactor": "AdamW is the only optimizer",
    r"save_strategy|save_only_model": "--save_steps N saves checkpoints, and the last step always saves one",
    r"logging_strategy|logging_first_step": "use --logging_steps N",
    r"logging_dir|run_name|project|trackio_.*": "--report_to tensorboard writes into OUTPUT_DIR/runs",
    r"dataloader_.*|group_by_length|train_sampling_strategy": (
        "rows are tokenized before training and loaded without workers"
    ),
    r"(bf16|fp16)_full_eval|half_precision_backend|fp16_backend|fp16_opt_level|tf32|dtype|torch_dtype": (
        "--bf16 and --fp16 set the precision of training and evaluation"
    ),
    r"use_cpu|no_cuda|local_rank|device_map": "--device names the device",
    r"do_train|do_predict": "train.py trains, and infer.py answers",
    r"(hub_|model_)?revision": "the base is taken from the hub's main branch; download another and name its folder",
    r"trust_remote_code": "code that comes with a base is never run",
    r"lora_.*|r|target_modules|peft_type|use_dora|use_rslora|modules_to_save|prefix_projection|encoder_.*": (
        "softprompt does prompt tuning only"
    ),
    r"inference_mode|task_type|token_dim|num_layers|num_attention_heads|num_transformer_submodules|peft_version"
    r"|tokenizer_(kwargs|name|name_or_path)|auto_mapping": "that setting of PEFT is derived from the base",
    r"min_length|min_new_tokens|num_beam_groups|diversity_penalty|penalty_alpha|length_penalty|typical_p|top_h|use_cache"
    r"|(epsilon|eta)_cutoff|bad_words_ids|force_words_ids|forced_(bos|eos)_token_id|guidance_scale|(bos|pad)_token_id"
    r"|cache_implementation|assistant_.*|prompt_lookup_num_tokens|renormalize_logits|output_(scores|logits)": (
        "that setting of transformers' generate is not supported"
    ),
    r"accelerator_config|activation_checkpointing.*|auto_find_batch_size|average_tokens_across_devices"
    r"|batch_eval_metrics|data_seed|ddp_.*|debug|deepspeed|disable_tqdm|enable_jit_checkpoint|eval_accumulation_steps"
    r"|eval_delay|eval_do_concat_batches|eval_on_start|eval_use_gather_object|fsdp.*|generation_.*"
    r"|gradient_checkpointing_kwargs|hub_always_push|hub_strategy|include_.*|label_names|label_smoothing_factor"
    r"|length_column_name|liger_kernel_config|log_level.*|log_on_each_node|logging_nan_inf_filter|lr_scheduler_kwargs"
    r"|neftune_noise_alpha|parallelism_config|past_index|predict_with_generate|prediction_loss_only"
    r"|remove_unused_columns|restore_callback_states_from_checkpoint|save_on_each_node|save_safetensors"
    r"|skip_memory_metrics|sortish_sampler|torch_.*|tpu_.*|use_ipex|use_liger_kernel|use_mps_device|jit_mode_eval"
    r"|max_(train|eval)_samples|cache_dir|config_name|use_fast_tokenizer|use_legacy.*": (
        "that setting of transformers' Trainer is not supported"
    ),
}
MIN_WORD_SIMILARITY = 0.75  # of each pair of words, by difflib's ratio


def advice(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return a clause for the message about an unknown setting: the one of `known` that is almost certainly meant, or
    the reason why there is none, or "". `prefix` is written before the suggestion."""
    known, written = set(known), re.sub(r"\W", "_", name.strip("-")).lower()
    meant = [n for n in (written, ALIASES.get(written), SECOND.get(written)) if n in known]
    if meant:
        return f"; did you mean {prefix}{meant[0]}?"
    for names, reason in REASONS.items():
        if re.fullmatch(names, written):
            return f"; {reason}"
    similarity = {other: _similarity(written, other) for other in sorted(known)}
    best = max(similarity, key=lambda other: similarity[other], default="")
    if best and similarity[best]:
        return f"; did you mean {prefix}{best}?"
    words = set(written.split("_"))
    longer = [other for other in known if len(words) > 1 and words < set(other.split("_"))]
    return f"; did you mean {prefix}{longer[0]}?" if len(longer) == 1 else ""


def _similarity(name: str, other: str) -> float:
    """Return the similarity of two names, from 0 to 1. It is 0 unless each word of `name` is similar to that of `other`
    or, if they differ in the number of words, all letters are nearly the same."""
    mine, theirs = name.split("_"), other.split("_")
    if len(mine) != len(theirs):
        ratio = SequenceMatcher(None, "".join(mine), "".join(theirs)).ratio()
        return ratio if ratio > 0.92 else 0.0
    each = [_word_similarity(*pair) for pair in zip(mine, theirs, strict=True)]
    return 0.0 if min(each) < MIN_WORD_SIMILARITY else SequenceMatcher(None, name, other).ratio()


def _word_similarity(mine: str, theirs: str) -> float:
    if len(mine) > 2 and theirs.startswith(mine):  # an abbreviation
        return 1.0
    return SequenceMatcher(None, mine, theirs).ratio()
