"""From what is given to the settings of a run, in one place.

The dataclasses of `arguments` make a `TrainConfig`; presets override their defaults, a config file overrides the
preset, and the command line overrides both. Validation collects every fault and raises one `ConfigError`.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from softprompt.config.schema import AUTO, build, closest_name, expand_paths
from softprompt.config.train_args import (
    DEFAULT_LEARNING_RATES,
    SECRETS,
    DataArguments,
    ModelArguments,
    PromptTuningArguments,
    SharingArguments,
    TrainingArguments,
)
from softprompt.config.validation import faults, parse_columns
from softprompt.utils.errors import ConfigError
from softprompt.utils.redact import add_secret

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


def preset_of(preset: str | None, given: Mapping[str, Any]) -> str | None:
    """The preset that a call runs under: the one it names, else `mini` unless it names a base of its own."""
    if preset is not None and str(preset) not in PRESETS:
        hint = closest_name(str(preset), PRESETS)
        raise ConfigError(f"unknown preset {preset!r}, expected one of {', '.join(PRESETS)}{hint}")
    return preset or (None if given.get("model_name_or_path") else "mini")


def train_config(preset: str | None = None, **given: Any) -> TrainConfig:
    """Settings from keyword arguments under the flags' names, over the preset's, over the defaults. With
    `resume_from_checkpoint` they are only a part, which `resume_config.merge_settings` completes and checks as a whole.

    Raises:
        ConfigError: an unknown preset or field, a value of a wrong type or out of range, settings that contradict
            each other; every fault is in the one message.
    """
    config = unvalidated_config(preset, given)
    return config if config.training.resume_from_checkpoint else validated(config)


def unvalidated_config(preset: str | None, given: Mapping[str, Any]) -> TrainConfig:
    """Settings of known names and right types; whether they are in range and go together is yet to be `checked`.

    Raises:
        ConfigError: an unknown preset or field, or a value of a wrong type.
    """
    for name in SECRETS:
        if given.get(name):
            add_secret(str(given[name]))
    named = {} if preset is None else {"preset": preset}
    given = expand_paths(given)
    preset = preset_of(preset, given)
    values = {**(PRESETS[preset] if preset else {}), **given}
    if values.get("eval_steps") not in (None, AUTO):
        values.setdefault("eval_strategy", "steps")
    return TrainConfig(preset, *build(GROUPS, values), {**named, **given})


def validated(config: TrainConfig) -> TrainConfig:
    """The same settings.

    Raises:
        ConfigError: a value out of range, or settings that contradict each other.
    """
    parts = (config.model, config.data, config.prompt, config.training, config.sharing)
    if found := list(faults(*parts, config.given)):
        raise ConfigError("; ".join(found))
    return config
