"""Settings of `python -m softprompt export`, validated like those of `config.loader`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from softprompt.config.arg_parser import FlagParser
from softprompt.config.schema import build, option
from softprompt.utils.errors import ConfigError

EXAMPLES = (
    ("Write a model that transformers, servers and llama.cpp can load", "runs/my-run --output my-model"),
    ("Write it in half the size", "runs/my-run --output my-model --dtype bfloat16"),
    ("Serve the unchanged base with vLLM, and send it the prompt", "runs/my-run --output my-prompt --engine vllm"),
)


@dataclass(frozen=True)
class ExportArguments:
    """The flags of the command."""

    _argument_group_name: ClassVar[str] = "export"

    output: str | None = option(None, "Write into this folder, which must not exist yet.", "DIR")
    engine: Literal["transformers", "vllm"] = option(
        "transformers",
        "Write what this engine needs: a whole model; or, for vllm, the prompt alone, a chat template and a client, "
        "for a server that runs the unchanged base and accepts prompt embeddings.",
    )
    model_name_or_path: str | None = option(
        None, "Use this base model. (default: the one that the adapter names)", "BASE"
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = option(
        "float32",
        "Write all weights, the prompt included, in this dtype. float32 gives the answers of infer.py on a CPU; auto "
        "keeps the dtype of the base's files and rounds the prompt to it.",
    )


def export_arguments(adapter: str, **given: Any) -> ExportArguments:
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
    return arguments


def parse_export(argv: Sequence[str]) -> tuple[str, ExportArguments]:
    """Return the adapter's folder and the settings of `export`, from its command line.

    Raises:
        ConfigError: An argument is wrong.
    """
    description = (
        "Write a base and its learned prompt as one plain transformers model, which needs no softprompt; or the prompt "
        "alone, for vLLM."
    )
    usage = "ADAPTER --output DIR [--flag value …]"
    parser = FlagParser([ExportArguments], "export", description, usage, examples=EXAMPLES)
    parser.add_argument("adapter", metavar="ADAPTER", help="Adapter folder, written by softprompt or by PEFT.")
    given = parser.parse(argv)
    return given["adapter"], export_arguments(**given)
