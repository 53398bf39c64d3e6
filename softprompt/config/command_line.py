"""The settings of `train`, `infer` and `chat`, parsed from their command lines."""

import argparse
from collections.abc import Sequence
from dataclasses import fields

from softprompt.config.arg_parser import FlagParser, read_toml
from softprompt.config.infer_args import INFER_GROUPS, QuestionArguments
from softprompt.config.infer_config import InferConfig, infer_config
from softprompt.config.loader import GROUPS, PRESETS, TrainConfig, train_config
from softprompt.utils.errors import ConfigError
from softprompt.utils.shell_commands import command, program_name


def parse_training(argv: Sequence[str]) -> TrainConfig:
    """Return the settings of `train`: flags override --config FILE.toml, which overrides the preset and the defaults.

    Raises:
        ConfigError: A flag or the file is wrong.
    """
    parser = FlagParser(GROUPS, program_name("train"), "Learn a soft prompt for a frozen language model.")
    start = parser.add_argument_group("start")
    start.add_argument(
        "--preset",
        help=f"Start from these defaults: {', '.join(PRESETS)}. (default: mini; none if --model_name_or_path is given)",
    )
    start.add_argument("--config", metavar="FILE.toml", help="Read settings from this file; flags override it.")
    given = parser.parse(argv)
    from_file = read_toml(given.pop("config"), GROUPS) if "config" in given else {}
    return train_config(**{**from_file, **given})


def parse_inference(argv: Sequence[str]) -> InferConfig:
    """Return the settings of `infer`.

    Raises:
        ConfigError: A flag is wrong.
    """
    description = "Answer questions with a learned prompt, or evaluate prompts. Without either, chat on the terminal."
    return infer_config(**FlagParser(INFER_GROUPS, program_name("infer"), description).parse(argv))


def parse_chat(argv: Sequence[str]) -> InferConfig:
    """Return the settings of `chat`: those of `infer` except the ones that ask a question or name an evaluation.

    Raises:
        ConfigError: A flag is wrong, or the command line asks a question.
    """
    asking = {field.name for field in fields(QuestionArguments)} - {"stream"}
    description = "Hold a conversation on the terminal. Type /help there to list its commands."
    parser = FlagParser(INFER_GROUPS, program_name("chat"), description, hidden=asking)
    parser.add_argument("question", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse(argv)
    named = [f"--{name}" for name in given if name in asking]
    if question := given.pop("question", []):
        named.append(repr(question[0]))
    if named:
        raise ConfigError(
            f"this is a conversation and takes no {named[0]}; type questions once it has started, or use: "
            f"{command('infer')} --prompt …"
        )
    return infer_config(**given)
