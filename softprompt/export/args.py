"""Settings of `python -m softprompt export`, validated like those of `config.loader`."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from softprompt.config.schema import build, option
from softprompt.utils.errors import ConfigError


@dataclass(frozen=True)
class ExportArguments:
    """The flags of the command."""

    _argument_group_name: ClassVar[str] = "export"

    output: str | None = option(None, "Write the model into this folder, which must not exist yet.")
    model_name_or_path: str | None = option(None, "Use this base model. (default: the one that the adapter names)")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = option(
        "float32",
        "Write all weights, the prompt included, in this dtype. float32 gives the answers of infer.py on a CPU; auto "
        "keeps the dtype of the base's files and rounds the prompt to it.",
    )


@dataclass(frozen=True)
class ExportConfig:
    """Validated settings of an export.

    Args:
        adapter: Adapter folder.
        output: Folder to write.
        model_name_or_path: Folder or hub id of the base; None for the base that the adapter names.
        dtype: Dtype of the written weights, or "auto".
    """

    adapter: str
    output: str
    model_name_or_path: str | None
    dtype: str


def export_config(adapter: str, **given: Any) -> ExportConfig:
    """Return the settings of an export.

    Args:
        adapter: Adapter folder.
        given: The command's flags as keyword arguments.

    Raises:
        ConfigError: A setting is unknown or has a wrong value, or `adapter` or `output` is missing.
    """
    (arguments,) = build([ExportArguments], given)
    if not arguments.output:
        raise ConfigError("--output is missing; name the folder to write")
    if not adapter:
        raise ConfigError("the adapter's name is empty; give an adapter folder")
    return ExportConfig(adapter, arguments.output, arguments.model_name_or_path, arguments.dtype)
