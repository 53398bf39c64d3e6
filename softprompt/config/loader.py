"""Build the settings of a training run, a `TrainConfig`, from its dataclasses.

A preset overrides the defaults of the dataclasses, a config file overrides the preset, and flags override both.
Validation collects every fault and raises one `ConfigError`.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from softprompt.config.data_args import DataArguments
from softprompt.config.distill_args import DEFAULT_DISTILLED_STEPS, DEFAULT_DISTILLED_TOKENS, DistillationArguments
from softprompt.config.schema import AUTO, build, closest_name, expand_paths
from softprompt.config.train_args import (
    DEFAULT_NUM_VIRTUAL_TOKENS,
    SECRETS,
    ModelArguments,
    PromptTuningArguments,
    SharingArguments,
    TrainingArguments,
    default_learning_rate,
)
from softprompt.config.validation import faults
from softprompt.config.value_parsers import parse_columns
from softprompt.utils.errors import ConfigError
from softprompt.utils.redact import add_secret

GROUPS = (
    *(ModelArguments, DataArguments, PromptTuningArguments, TrainingArguments, SharingArguments),
    DistillationArguments,
)
_BLOOM = {
    "model_name_or_path": "Langboat/bloom-1b4-zh",
    "dataset": "alpaca_data_zh",
    "prompt_tuning_init": "RANDOM",
}
PRESETS: dict[str, dict[str, Any]] = {
    "mini": {
        "model_name_or_path": "mini",
        "dataset": "mini:sentiment",
        "prompt_tuning_init": "RANDOM",
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 50,
        "gradient_accumulation_steps": 1,
    },
    "distill-mini": {
        "model_name_or_path": "mini",
        "dataset": "mini:reply",
        "distill_prompt": "mini:reply",
        "distill_samples": 2,
        "num_virtual_tokens": 4,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 50,
        "gradient_accumulation_steps": 1,
        "max_steps": 60,
    },
    "bloom-1b4-zh": _BLOOM,
    "article": {**_BLOOM, "learning_rate": 5e-5},
}
PRESET_SUMMARIES = {
    "mini": "a first try without network, in less than a minute: the small base in this package and one of its tasks",
    "distill-mini": "distillation without network, in less than a minute: 4 virtual tokens replace a request",
    "bloom-1b4-zh": "the article's training, with a learning rate that works",
    "article": "the article's training as it is, which hardly moves a RANDOM prompt",
}


@dataclass(frozen=True)
class TrainConfig:
    """The settings of one run. `preset` is None if a base was given without a preset. `given` holds the settings that
    were given explicitly, by the names of their flags."""

    preset: str | None
    model: ModelArguments
    data: DataArguments
    prompt: PromptTuningArguments
    training: TrainingArguments
    sharing: SharingArguments = dataclasses.field(default_factory=SharingArguments)
    distillation: DistillationArguments = dataclasses.field(default_factory=DistillationArguments)
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @property
    def parts(self) -> tuple[Any, ...]:
        """The settings of each group."""
        return self.model, self.data, self.prompt, self.training, self.sharing, self.distillation

    def learning_rate(self, word_rms: float | None = None) -> float | None:
        """Return the peak learning rate: the one given, else the default (see `default_learning_rate`)."""
        if self.training.learning_rate is not None:
            return self.training.learning_rate
        prompt, distills = self.prompt, bool(self.distillation.text)
        return default_learning_rate(prompt.prompt_tuning_init, prompt.prompt_reparameterization, word_rms, distills)

    @property
    def columns(self) -> dict[str, str]:
        """The pairs of --columns: our column → the dataset's; empty if the flag is not given."""
        return parse_columns(self.data.columns)

    def as_dict(self) -> dict[str, Any]:
        """Return every setting except secrets, by the names of the flags, with values that JSON can hold."""
        flat = {"preset": self.preset}
        for part in self.parts:
            flat |= dataclasses.asdict(part)
        return {name: value for name, value in flat.items() if name not in SECRETS}


def default_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the default of every setting, given the preset, the prompt's initialization and reparameterization, and
    the text to distill that `settings` name."""
    defaults = {f.name: f.default for group in GROUPS for f in dataclasses.fields(group)}
    init, reparameterization = (settings.get(name) for name in ("prompt_tuning_init", "prompt_reparameterization"))
    rate = default_learning_rate(init, reparameterization or "none") if init else None
    defaults |= {"learning_rate": rate, "num_virtual_tokens": DEFAULT_NUM_VIRTUAL_TOKENS}
    return defaults | _distillation_defaults(settings) | _preset_settings(settings.get("preset"), settings)


def _preset_settings(preset: str | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a preset. If `settings` name a text to distill, the rows and the initial prompt of a
    preset for training on answers are left out: the rows are no questions about the text, and the prompt starts from
    it."""
    values = PRESETS[preset] if preset else {}
    distills = settings.get("distill_prompt") or settings.get("distill_context")
    if not distills or "distill_prompt" in values:
        return values
    return {name: value for name, value in values.items() if name not in ("dataset", "prompt_tuning_init")}


def _distillation_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults that differ in a distillation; an empty dict if `settings` name no text."""
    if not (settings.get("distill_prompt") or settings.get("distill_context")):
        return {}
    start = {"prompt_tuning_init": "TEXT", "num_virtual_tokens": DEFAULT_DISTILLED_TOKENS}
    return {"max_steps": DEFAULT_DISTILLED_STEPS, **({} if settings.get("init_adapter") else start)}


def preset_of(preset: str | None, given: Mapping[str, Any]) -> str | None:
    """Return the preset of a run: the one it names, else `mini` unless it names a base of its own.

    Raises:
        ConfigError: There is no such preset.
    """
    if preset is not None and str(preset) not in PRESETS:
        hint = closest_name(str(preset), PRESETS)
        if not hint and re.search(r"[./:\\]", str(preset)):  # softprompt.train("rows.jsonl")
            hint = f"; if these are rows to train on, name them with dataset={preset!r}"
        raise ConfigError(f"unknown preset {preset!r}, expected one of {', '.join(PRESETS)}{hint}")
    return preset or (None if given.get("model_name_or_path") else "mini")


def train_config(preset: str | None = None, **given: Any) -> TrainConfig:
    """Return validated settings from keyword arguments with the names of the flags, which override the preset's.

    With `resume_from_checkpoint`, the result is not validated, because it is incomplete:
    `training.resume_settings.merge_settings` completes the settings from the checkpoint and validates them.

    Raises:
        ConfigError: An unknown preset or setting, a value of a wrong type or out of range, or settings that contradict
            each other; the message names all of them.
    """
    config = unvalidated_config(preset, given)
    return config if config.training.resume_from_checkpoint else validated(config)


def unvalidated_config(preset: str | None, given: Mapping[str, Any]) -> TrainConfig:
    """Return settings after checking their names and types; `validated` checks their ranges and combinations.

    Raises:
        ConfigError: An unknown preset or setting, or a value of a wrong type.
    """
    for name in SECRETS:
        if given.get(name):
            add_secret(str(given[name]))
    named = {} if preset is None else {"preset": preset}
    given = expand_paths(given)
    preset = preset_of(preset, given)
    values = {**_preset_settings(preset, given), **given}
    if values.get("eval_steps") not in (None, AUTO):
        values.setdefault("eval_strategy", "steps")
    defaults = _distillation_defaults(values)
    if values.get("num_train_epochs") is not None:
        defaults.pop("max_steps", None)
    values = {**defaults, **values}
    return TrainConfig(preset, *build(GROUPS, values), {**named, **given})


def validated(config: TrainConfig) -> TrainConfig:
    """Check ranges and combinations, and return the same settings.

    Raises:
        ConfigError: A value out of range, or settings that contradict each other.
    """
    if found := list(faults(config)):
        raise ConfigError("; ".join(found))
    return config
