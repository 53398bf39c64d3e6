"""The settings of `train`, `infer` and `chat`, parsed from their command lines."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

from softprompt.config.arg_parser import FlagParser, read_toml
from softprompt.config.help_text import preset_help
from softprompt.config.infer_args import INFER_GROUPS, QuestionArguments
from softprompt.config.infer_config import InferConfig, infer_config
from softprompt.config.loader import GROUPS, PRESET_SUMMARIES, PRESETS, TrainConfig, train_config
from softprompt.config.schema import option
from softprompt.utils.errors import ConfigError
from softprompt.utils.shell_commands import command

SWITCHES = "A flag without a value, such as {}, is a switch: `{} false` turns it off."
TRAIN_EXAMPLES = (
    ("Try it without network, with the small base in this package", ""),
    (
        "Train on your own rows, and hold out 200 of them for evaluation",
        "--model_name_or_path Qwen/Qwen3-0.6B --dataset rows.jsonl --eval_rows 200",
    ),
    ("Continue a run that was stopped", "--resume_from_checkpoint runs/my-run"),
)
INFER_EXAMPLES = (
    ("Ask the newest run under runs/", '--prompt "我爱这部电影"'),
    ("Answer each line of a file", "--adapter runs/my-run --prompts_file questions.txt --output_file answers.jsonl"),
    (
        "Compare a prompt with the base alone on rows with answers",
        "--adapter runs/my-run --adapter none --eval_dataset rows.jsonl",
    ),
)
CHAT_EXAMPLES = (
    ("Talk to the newest run under runs/", ""),
    ("Talk to a run that you name, with the most likely answers", "--adapter runs/my-run --do_sample false"),
    ("Switch between a prompt and the base alone, by /adapter", "--adapter mine=runs/my-run --adapter none"),
)


@dataclass(frozen=True)
class StartArguments:
    """Where the settings of a run come from, before its other flags."""

    _argument_group_name: ClassVar[str] = "start"

    preset: str | None = option(None, preset_help(PRESETS, PRESET_SUMMARIES), "NAME")
    config: str | None = option(
        None, "Read settings from this TOML file; flags override it. (default: none)", "FILE.toml"
    )


def parse_training(argv: Sequence[str]) -> TrainConfig:
    """Return the settings of `train`: flags override --config FILE.toml, which overrides the preset and the defaults.

    Raises:
        ConfigError: A flag or the file is wrong.
    """
    description = f"Learn a soft prompt for a frozen language model. {SWITCHES.format('--dry_run', '--dry_run')}"
    parser = FlagParser((StartArguments, *GROUPS), "train", description, presets=PRESETS, examples=TRAIN_EXAMPLES)
    given = parser.parse(argv)
    from_file = read_toml(given.pop("config"), GROUPS) if "config" in given else {}
    return train_config(**{**from_file, **given})


def parse_inference(argv: Sequence[str]) -> InferConfig:
    """Return the settings of `infer`.

    Raises:
        ConfigError: A flag is wrong.
    """
    switches = SWITCHES.format("--do_sample", "--do_sample")
    description = (
        f"Answer questions with a learned prompt, or evaluate prompts. Without either, chat on the terminal. {switches}"
    )
    return infer_config(**FlagParser(INFER_GROUPS, "infer", description, examples=INFER_EXAMPLES).parse(argv))


def parse_chat(argv: Sequence[str]) -> InferConfig:
    """Return the settings of `chat`: those of `infer` except the ones that ask a question or name an evaluation.

    Raises:
        ConfigError: A flag is wrong, or the command line asks a question.
    """
    asking = {field.name for field in fields(QuestionArguments)} - {"stream"}
    description = "Hold a conversation on the terminal. Type /help there to list its commands."
    parser = FlagParser(INFER_GROUPS, "chat", description, hidden=asking, examples=CHAT_EXAMPLES)
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
