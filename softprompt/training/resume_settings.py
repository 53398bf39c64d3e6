"""The settings of a resumed run: those of the checkpoint, overridden by those given now."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from softprompt.config.loader import TrainConfig, unvalidated_config, validated
from softprompt.config.schema import AUTO
from softprompt.config.train_args import MLP_LEARNING_RATE, Reparameterization
from softprompt.data.template import CHAT
from softprompt.runs.train_state import OF_THIS_CALL
from softprompt.utils.errors import CheckpointError, ConfigError

FIXED_AT_START = (
    *("num_virtual_tokens", "prompt_tuning_init", "prompt_tuning_init_text", "class_labels", "vocab_population"),
    *("init_adapter", "find_learning_rate", "preset", "prompt_reparameterization", "encoder_hidden_size"),
    *("distill_samples", "distill_max_new_tokens", "distill_questions", "chat_template_date"),
)
# The defaults of versions that did not save a default rate, for RANDOM and for prompts that start on word embeddings.
EARLIER_RANDOM_LEARNING_RATE, EARLIER_WORD_LEARNING_RATE = 1e-1, 3e-2
DISTILLS = ("distill_prompt", "distill_context")
# A run may use at most one setting of each group; the one that is given now replaces the checkpoint's.
EXCLUSIVE = (
    ("bf16", "fp16"),
    ("eval_dataset", "eval_rows"),
    DISTILLS,
    ("load_in_8bit", "load_in_4bit", "stream_base", "shard_base"),
)
# If the setting on the right is given now, the checkpoint's value of the setting on the left is dropped, so that its
# default is derived again.
DERIVED = {
    "attn_implementation": "device",
    "eval_strategy": "eval_steps",
    "greater_is_better": "metric_for_best_model",
    "max_steps": "num_train_epochs",
}
# The checkpoint's value of the setting on the left is dropped if none of the settings on the right is on any more.
ONLY_WITH = {
    "buffer_size": ("streaming",),
    "offload_folder": ("load_in_8bit", "load_in_4bit", "stream_base", "shard_base"),
    "hub_model_id": ("push_to_hub",),
    "hub_private_repo": ("push_to_hub",),
    "early_stopping_threshold": ("early_stopping_patience",),
}


def merge_settings(config: TrainConfig, checkpoint: Path, state: Mapping[str, Any]) -> TrainConfig:
    """Merge the settings given now over those of the checkpoint, derive defaults again, and check the result. Settings
    in FIXED_AT_START keep the checkpoint's values. Each difference is printed with the value that is used. `given` of
    the result holds what is given now.

    Raises:
        ConfigError: A value out of range, or settings that contradict each other.
        CheckpointError: Another reparameterization is given, or a text to distill is added to a run that has none or
            removed from one that has one.
    """
    saved = _with_learning_rate(state["arguments"])
    _check_reparameterization(config, checkpoint, saved)
    _check_distillation(config, checkpoint, saved)
    given = {name: value for name, value in config.given.items() if not _is_fixed(name, saved)}
    given |= {name: getattr(config.training, name) for name in ("resume_from_checkpoint", "overwrite_output_dir")}
    given["output_dir"] = config.training.output_dir or str(checkpoint.parent)
    old = {name: value for name, value in saved.items() if name not in (*OF_THIS_CALL, "preset")}
    if saved.get("template") != CHAT:
        old.pop("chat_template_date", None)  # earlier versions took it with any template
    if _same_engine(given, saved):
        old |= state["engine"]  # the size of micro-batches, which may have been reduced because memory ran out
    searched = bool(old.pop("find_learning_rate", False))  # the learning rate that was found is among the settings
    dropped = _dropped(old, given, _same_engine(given, saved))
    kept = {name: value for name, value in old.items() if name not in dropped}
    resumed = unvalidated_config(saved.get("preset"), {**kept, **given})
    try:
        validated(resumed)
    except ConfigError as error:
        raise ConfigError(f"{error} (settings that are not given are taken from {checkpoint})") from None
    _print_differences(config, resumed, saved, dropped, checkpoint.name)
    return replace(resumed, training=replace(resumed.training, find_learning_rate=searched), given=given)


def _with_learning_rate(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a checkpoint's settings with the learning rate that the run has used. Versions whose default did not
    depend on the base did not save a default."""
    if saved["learning_rate"] is not None:
        return saved
    is_random = saved["prompt_tuning_init"] == "RANDOM"
    rate = EARLIER_RANDOM_LEARNING_RATE if is_random else EARLIER_WORD_LEARNING_RATE
    is_plain = saved.get("prompt_reparameterization", "none") == "none"
    return {**saved, "learning_rate": rate if is_plain else MLP_LEARNING_RATE}


def _check_reparameterization(config: TrainConfig, checkpoint: Path, saved: Mapping[str, Any]) -> None:
    """Raise CheckpointError if another reparameterization or width is given than the checkpoint's, whose trained
    parameters it could not use, or if this version does not have the checkpoint's."""
    was = {"prompt_reparameterization": saved.get("prompt_reparameterization", "none")}  # absent in earlier versions
    was["encoder_hidden_size"] = saved.get("encoder_hidden_size")
    if (kind := was["prompt_reparameterization"]) not in get_args(Reparameterization):
        raise CheckpointError(
            f"{checkpoint}: was trained with --prompt_reparameterization {kind}, which this version does not have; "
            f"start a new run from its prompt with --init_adapter {checkpoint}"
        )
    for name, value in was.items():
        given = config.given.get(name)
        if given not in (None, value):
            begun = " ".join(f"--{name} {value}" for name, value in was.items() if value is not None)
            raise CheckpointError(
                f"{checkpoint}: was trained with {begun}, and cannot continue with --{name} {given}; leave it out, or "
                f"start a new run from this prompt with --init_adapter {checkpoint}"
            )


def _check_distillation(config: TrainConfig, checkpoint: Path, saved: Mapping[str, Any]) -> None:
    """Raise CheckpointError if a text to distill is given for a run that is no distillation, or taken from one that is:
    another loss would continue with the optimizer's state."""
    was = any(saved.get(name) for name in DISTILLS)
    now = any({**saved, **config.given}.get(name) for name in DISTILLS)
    if now != was:
        raise CheckpointError(
            f"{checkpoint}: was trained {'with' if was else 'without'} a text to distill, and cannot continue "
            f"{'without' if was else 'with'} one; start a new run from this prompt with --init_adapter {checkpoint}"
        )


def _same_engine(given: Mapping[str, Any], saved: Mapping[str, Any]) -> bool:
    return bool(given.get("engine", saved.get("engine")) == saved.get("engine"))


def _dropped(old: Mapping[str, Any], given: Mapping[str, Any], same_engine: bool) -> set[str]:
    """Return the names of the checkpoint's settings that do not apply any more, given the new ones."""
    on = {name for name, value in given.items() if value not in (None, False, 0, AUTO)}
    dropped = {name for group in EXCLUSIVE if on & set(group) for name in group}
    dropped |= {name for name, by in DERIVED.items() if by in on}
    left = on | {name for name, value in old.items() if value and name not in dropped and name not in given}
    dropped |= {name for name, by in ONLY_WITH.items() if given.keys() & set(by) and not left & set(by)}
    if not same_engine:
        dropped |= {"tokens_per_microbatch", "attn_implementation"}
    return (dropped & old.keys()) - given.keys()


def _print_differences(
    asked: TrainConfig,
    resumed: TrainConfig,
    saved: Mapping[str, Any],
    dropped: Collection[str],
    where: str,
) -> None:
    """Print a line for each given or dropped setting that differs from the checkpoint's."""
    given, merged = asked.as_dict(), resumed.as_dict()
    for name in (*asked.given, *sorted(dropped)):
        begins = _is_fixed(name, saved)
        value, was = (given if begins else merged).get(name), saved.get(name)
        if name not in OF_THIS_CALL and value != was:
            wins = "the checkpoint's wins" if begins else "the new one wins"
            print(f"--{name}: {was} in {where}, {value} now: {wins}")


def _is_fixed(name: str, saved: Mapping[str, Any]) -> bool:
    """Whether a setting keeps the checkpoint's value. Earlier versions saved no date, so one may be given."""
    return name in FIXED_AT_START and not (name == "chat_template_date" and saved.get(name) is None)


def saved_config(saved: Mapping[str, Any]) -> TrainConfig:
    """Return the settings that a checkpoint was saved with."""
    arguments = {name: value for name, value in saved["arguments"].items() if name != "preset"}
    return unvalidated_config(saved["arguments"].get("preset"), arguments)
