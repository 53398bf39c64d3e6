"""Settings of the command `export`, and their validation."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from softprompt.config.schema import build, option
from softprompt.utils.errors import ConfigError


@dataclass(frozen=True)
class ExportArguments:
    _argument_group_name: ClassVar[str] = "export"

    output: str | None = option(
        None, "Write the model into this folder, which must not exist. (default: none; required)"
    )
    model_name_or_path: str | None = option(None, "Use this base model. (default: the one that the adapter names)")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = option(
        "float32",
        "Write the weights, including the prompt, in this dtype. float32 answers as infer.py does on a CPU; auto takes "
        "the dtype of the base's files and rounds the prompt to it.",
    )


@dataclass(frozen=True)
class ExportConfig:
    """The settings of one export: folders to read and to write, and the base, by default the one that the adapter
    names."""

    adapter: str
    output: str
    model_name_or_path: str | None
    dtype: str


def export_config(adapter: str, **given: Any) -> ExportConfig:
    """Return validated settings of an export from keyword arguments with the names of the flags.

    Raises:
        ConfigError: as of `config.loader.train_config`, or there is no `output`.
    """
    (arguments,) = build([ExportArguments], given)
    if not arguments.output:
        raise ConfigError("--output is missing; name the folder to write")
    if not adapter:
        raise ConfigError("ADAPTER is empty; name an adapter folder")
    return ExportConfig(adapter, arguments.output, arguments.model_name_or_path, arguments.dtype)
