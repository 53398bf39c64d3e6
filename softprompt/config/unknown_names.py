"""Advice about an unknown setting: the setting that is meant, or why a setting of another library has no counterpart
here. A setting with another meaning is never suggested."""

import re
from collections.abc import Iterable
from difflib import SequenceMatcher

# Other common names of our settings: those of transformers' example scripts, PEFT, Axolotl, LLaMA-Factory, LitGPT,
# llama.cpp and vLLM, and what people type. A name may mean several settings; the first that a command has is suggested.
OTHER_NAMES = {
    "learning_rate": "lr learn_rate peak_lr max_lr base_lr step_size",
    "per_device_train_batch_size": "batch_size train_batch_size bs bsz batch micro_batch_size per_gpu_train_batch_size "
    "train_bs per_device_batch_size",
    "per_device_eval_batch_size": "eval_batch_size per_gpu_eval_batch_size per_device_test_batch_size eval_bs "
    "val_batch_size",
    "gradient_accumulation_steps": "accumulation_steps grad_accum grad_acc gradient_accumulation ga "
    "grad_accumulation_steps accumulate_grad_batches gradient_accumulation_iters",
    "num_train_epochs": "epoch epochs num_epochs n_epochs max_epochs train_epochs ep",
    "max_steps": "steps num_steps n_steps max_train_steps num_train_steps train_steps total_steps iters max_iters "
    "iterations num_iterations",
    "lr_scheduler_type": "scheduler lr_scheduler scheduler_type lr_schedule lr_decay_style",
    "warmup_steps": "warmup num_warmup_steps warmup_ratio warmup_iters lr_warmup_steps warmup_proportion",
    "weight_decay": "wd decay",
    "adam_beta1": "beta1 adamw_beta1",
    "adam_beta2": "beta2 adamw_beta2",
    "adam_epsilon": "eps epsilon adam_eps",
    "max_grad_norm": "clip_grad grad_clip gradient_clipping clip_grad_norm grad_norm clip max_norm "
    "gradient_clip_val gradient_clip",
    "model_name_or_path": "model model_name model_path model_dir model_id base_model base base_model_name_or_path m "
    "pretrained pretrained_model pretrained_model_name_or_path llm checkpoint_dir",
    "dataset": "data data_path data_file data_files data_dir dataset_name dataset_path train_file train_data "
    "train_dataset train_path train_set rows",
    "eval_dataset": "eval_file eval_data eval_path eval_set validation_file validation_data validation_dataset "
    "val_file val_data val_set val_dataset valid_file valid_data test_file test_data test_dataset test_set dev_file "
    "dev_data dev_set dataset data data_file eval evaluate",
    "eval_rows": "val_set_size val_size eval_size test_size validation_size num_eval_rows held_out_rows holdout "
    "held_out validation_split_percentage val_split_fraction",
    "dataset_split": "split train_split",
    "eval_split": "val_split validation_split test_split split dataset_split",
    "dataset_config_name": "dataset_config subset",
    "columns": "column_names field_names column_mapping rename_columns",
    "template": "prompt_template prompt_format chat_template",
    "max_length": "max_len max_seq_length max_seq_len model_max_length cutoff_len block_size seq_len seq_length "
    "sequence_len sequence_length context_length max_input_length max_source_length max_token_length max_model_len "
    "ctx_size",
    "truncation_side": "truncation truncate_side",
    "preprocessing_num_workers": "num_proc dataset_num_proc preprocessing_workers",
    "num_virtual_tokens": "virtual_tokens num_tokens n_tokens tokens prompt_length prompt_tokens prompt_len "
    "num_soft_tokens soft_tokens num_prompt_tokens n_prompt_tokens soft_prompt_length prefix_length pre_seq_len",
    "prompt_tuning_init": "init prompt_init prompt_tuning_initialization initialization init_from",
    "prompt_tuning_init_text": "init_text prompt_init_text initial_text",
    "prompt_reparameterization": "encoder_reparameterization_type reparameterization reparameterization_type",
    "encoder_hidden_size": "bottleneck_size encoder_width",
    "class_labels": "labels verbalizers label_words classes label_list",
    "init_adapter": "adapter adapter_name_or_path adapter_path initial_prompt load_adapter",
    "output_dir": "out output out_dir outdir save_dir save_path save_to output_path output_folder dest o run_dir",
    "resume_from_checkpoint": "resume resume_from checkpoint ckpt ckpt_path checkpoint_path continue continue_from "
    "resume_from_ckpt load_checkpoint",
    "overwrite_output_dir": "overwrite force",
    "overwrite_output_file": "overwrite force",
    "seed": "random_seed manual_seed random_state rng_seed",
    "deterministic": "full_determinism use_deterministic_algorithms",
    "logging_steps": "log_steps log_every log_interval log_every_n_steps print_freq",
    "save_steps": "save_every save_interval checkpoint_steps save_every_n_steps ckpt_every",
    "eval_steps": "eval_every eval_interval evaluation_steps val_interval val_check_interval",
    "eval_strategy": "evaluation_strategy do_eval evaluate_during_training",
    "early_stopping_patience": "patience early_stopping early_stop",
    "load_best_model_at_end": "load_best_model load_best keep_best save_best",
    "metric_for_best_model": "best_metric metric monitor",
    "push_to_hub": "push upload upload_to_hub",
    "hub_token": "token hf_token use_auth_token push_to_hub_token",
    "hub_model_id": "push_to_hub_model_id repo_id hub_repo_id repo hub_repo hub_repository",
    "hub_private_repo": "private",
    "report_to": "tensorboard tb logger",
    "max_time": "time_limit max_hours timeout max_train_time",
    "device": "gpu gpus cuda use_gpu use_cuda gpu_id device_id",
    "load_in_8bit": "8bit int8 use_8bit load_8bit quantize_8bit",
    "load_in_4bit": "4bit int4 nf4 use_4bit load_4bit quantize_4bit qlora",
    "gradient_checkpointing": "grad_checkpointing activation_checkpointing checkpoint_activations",
    "offload_folder": "offload_dir",
    "prompt": "question instruction text q query ask message user_prompt",
    "prompts_file": "prompts prompt_file questions questions_file input_file file infile prompts_path",
    "output_file": "out output outfile out_file output_path save_path save_to o results results_file answers_file",
    "choices": "labels candidates options classes label_list label_words",
    "adapter": "adapter_name_or_path adapter_path adapters peft peft_model peft_path lora lora_path prompt_dir ckpt "
    "checkpoint ckpt_path run run_dir soft_prompt init_adapter weights",
    "max_new_tokens": "tokens max_tokens new_tokens max_new max_gen_length max_gen_len max_gen_toks n_predict "
    "num_predict max_output_tokens max_completion_tokens num_tokens n_tokens",
    "temperature": "temp t",
    "num_beams": "beams beam n_beams beam_size beam_width",
    "num_return_sequences": "n best_of num_samples num_answers num_generations",
    "do_sample": "sample sampling",
    "stop_strings": "stop stop_words stop_sequences stop_sequence",
    "repetition_penalty": "presence_penalty frequency_penalty rep_penalty repeat_penalty",
    "no_repeat_ngram_size": "ngram no_repeat_ngram",
    "batch_size": "per_device_eval_batch_size bs bsz eval_batch_size",
    "output": "out out_dir output_dir outdir save_dir save_path save_to output_path output_folder dest o",
}
ALIASES = {  # another name → the settings that it may mean
    name: [setting for setting, others in OTHER_NAMES.items() if name in others.split()]
    for name in " ".join(OTHER_NAMES.values()).split()
}
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
    r"encoder_num_layers|encoder_dropout": "--prompt_reparameterization mlp has PEFT's layers, and no dropout",
    r"lora_.*|r|target_modules|peft_type|use_dora|use_rslora|modules_to_save|prefix_projection": (
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
    meant = [n for n in (written, *ALIASES.get(written, ())) if n in known]
    if meant:
        return f"; did you mean {prefix}{meant[0]}?"
    for names, reason in REASONS.items():
        if re.fullmatch(names, written):
            return f"; {reason}"
    if written in ALIASES:  # what it means is a setting of another command
        return ""
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
