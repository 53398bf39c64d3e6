"""Settings of `python -m softprompt export`, each default in one place; validation as in config.py."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from softprompt.config.schema import build, option
from softprompt.utils.errors import ConfigError


@dataclass(frozen=True)
class ExportArguments:
    _argument_group_name: ClassVar[str] = "export"

    output: str | None = option(None, "Folder to write; it must not exist yet.")
    model_name_or_path: str | None = option(None, "Base model, over the one that the adapter names.")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = option(
        "float32",
        "Of the written weights, prompt included. float32 answers as infer.py does on a CPU; auto is that of the "
        "base's files, and rounds the prompt to it.",
    )


@dataclass(frozen=True)
class ExportConfig:
    """`adapter` and `output` are folders; `model_name_or_path` None is the base that the adapter names."""

    adapter: str
    output: str
    model_name_or_path: str | None
    dtype: str


def export_config(adapter: str, **given: Any) -> ExportConfig:
    """Settings of the export from keyword arguments under the flags' names.

    Raises:
        ConfigError: as of `train_config`, or no `output`.
    """
    (arguments,) = build([ExportArguments], given)
    if not arguments.output:
        raise ConfigError("--output is missing; name the folder to write")
    if not adapter:
        raise ConfigError("the adapter is an empty name; give an adapter folder")
    return ExportConfig(adapter, arguments.output, arguments.model_name_or_path, arguments.dtype)
