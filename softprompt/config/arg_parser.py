"""Command-line flags from the dataclasses of settings, with argparse.

In: the dataclasses and a command line. Out: the settings that were given, under the names of their fields. Presets,
files and defaults supply the others.
"""

import argparse
import dataclasses
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, get_args, get_type_hints

from softprompt.config.help_text import (
    Examples,
    HelpFormatter,
    Presets,
    choices_of,
    examples_text,
    flag_help,
    in_groups,
    value_name,
)
from softprompt.config.infer_args import GenerationArguments
from softprompt.config.schema import AUTO, setting_types, takes_auto, takes_list, union_members
from softprompt.config.train_args import NEWEST
from softprompt.config.unknown_names import advice
from softprompt.utils.errors import ConfigError
from softprompt.utils.shell_commands import command, program_name
from softprompt.utils.translation import FLAG, HELP, LANGUAGES, translate

TRUE, FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")
WITHOUT_VALUE = {"resume_from_checkpoint": NEWEST}  # the value of a flag that is given without one


class FlagParser(argparse.ArgumentParser):
    """An argparse parser of the fields of dataclasses, which raises ConfigError instead of printing usage.

    Every field becomes a flag of the same name, written with underscores or hyphens. `--flag` alone sets a boolean, and
    `--flag false` clears it. A flag that takes several values may also be repeated. `--help` shows the groups that
    `help_text.in_groups` makes of the dataclasses.
    """

    def __init__(
        self,
        groups: Sequence[type],
        name: str = "",
        description: str = "",
        usage: str = "[--flag value …]",
        hidden: Collection[str] = (),
        presets: Presets = MappingProxyType({}),
        examples: Examples = (),
    ):
        """Make the parser of a command.

        Args:
            groups: The dataclasses.
            name: The command, such as `train`.
            hidden: Flags that are parsed, but not shown by --help.
            presets: The settings of each preset, which --help shows as defaults.
            examples: Commands at the end of --help.
        """
        program, end = program_name(name), examples_text(command(name), examples) if examples else None
        super().__init__(
            program,
            f"{program} {usage}",
            translate(description),
            end,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
            add_help=False,
        )
        self._positionals.title, self._optionals.title = translate("arguments"), translate("flags")
        for title, group_fields, group in in_groups(groups):
            arguments, types = self.add_argument_group(translate(title)), get_type_hints(group)
            for field in group_fields:
                hint, is_hidden = types[field.name], field.name in hidden
                _add_flag(arguments, field, hint, argparse.SUPPRESS if is_hidden else flag_help(field, hint, presets))
        lang = self.add_argument_group(translate("language"))  # cli takes the flag out before a command is parsed
        lang.add_argument(FLAG, choices=LANGUAGES, help=translate(HELP))

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (--\w+)\S*:", r"\1:", message)
        if found := re.fullmatch(r"(--\w+): expected one argument", message):
            message = f"{found[1]}: expected one argument (write one that starts with - as {found[1]}=VALUE)"
        raise ConfigError(message)

    def parse(self, argv: Sequence[str]) -> dict[str, Any]:
        """Return only the settings that `argv` gives. `--help` prints the help and exits with code 0.

        Raises:
            ConfigError: An unknown flag, or a value that is not of the flag's type.
        """
        if {"-h", "--help"} & set(argv):
            for action in self._actions:  # --max-length does what --max_length does; show one of them
                action.option_strings = [flag for flag in action.option_strings if "-" not in flag.lstrip("-")]
            self.print_help()
            sys.exit(0)
        for action in self._actions:
            action.default = argparse.SUPPRESS
        namespace, rest = self.parse_known_args(list(argv))
        if rest:
            self._refuse(rest)
        return vars(namespace)

    def _refuse(self, unknown: Sequence[str]) -> NoReturn:
        flag = next((a for a in unknown if a.startswith("-")), unknown[0]).split("=")[0]
        if not flag.startswith("-"):
            raise ConfigError(f"unknown argument {flag}")
        known = [action.dest for action in self._actions if action.option_strings]
        raise ConfigError(f"unknown flag {flag}{advice(flag, known, '--')}")


def parse_setting(name: str, text: str) -> dict[str, Any]:
    """Parse one generation setting from text, as its command-line flag does. Several values of a setting that takes
    several are separated by spaces; one with a space in it is quoted, as in a shell.

    Raises:
        ConfigError: No such setting, or a value of another type.
    """
    values = _shell_words(text) if takes_list(setting_types([GenerationArguments]).get(name)) else [text]
    return FlagParser([GenerationArguments]).parse([f"--{name}={value}" for value in values])


def _shell_words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:  # an apostrophe, such as in don't
        return [text]


def read_toml(name: str, groups: Sequence[type]) -> dict[str, Any]:
    """Read `preset` and the settings of the dataclasses `groups` from a TOML file.

    Raises:
        ConfigError: The file cannot be read, is not TOML, or holds an unknown setting.
    """
    try:
        values = tomllib.loads(Path(name).expanduser().read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"--config {name}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML
        raise ConfigError(f"--config {name}: not TOML: {error}") from None
    if twice := [key for key in values if "-" in key and key.replace("-", "_") in values]:
        raise ConfigError(f"--config {name}: {', '.join(twice)} is given twice, with - and with _; keep one")
    values = {key.replace("-", "_"): value for key, value in values.items()}
    known: Mapping[str, Any] = {"preset": str, **setting_types(groups)}
    if unknown := [f"unknown setting {key!r}{advice(key, known)}" for key in values if key not in known]:
        raise ConfigError(f"--config {name}: {'; '.join(unknown)}")
    return values


def _add_flag(arguments: Any, field: dataclasses.Field[Any], hint: Any, text: str) -> None:
    kwargs = {"default": field.default, "help": text, **_value_of(hint)}
    kwargs["metavar"] = value_name(hint, field.metadata["metavar"])
    if field.name in WITHOUT_VALUE:
        kwargs |= {"nargs": "?", "const": WITHOUT_VALUE[field.name]}
    arguments.add_argument(*dict.fromkeys([f"--{field.name}", f"--{field.name.replace('_', '-')}"]), **kwargs)


def _value_of(hint: Any) -> dict[str, Any]:
    """Return the keyword arguments with which argparse parses values of this type."""
    types = [member for member in union_members(hint) if member is not type(None)]
    if bool in types:
        return {"type": _boolean, "nargs": "?", "const": True}
    if choices := choices_of(hint):
        return {"choices": choices}
    if takes_list(hint):
        return {"type": get_args(types[0])[0], "nargs": "+", "action": "extend"}
    return {"type": _or_auto(types[0]) if takes_auto(hint) else types[0]}


def _boolean(text: str) -> bool:
    if text.lower() not in (*TRUE, *FALSE):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in TRUE


def _or_auto(convert: Any) -> Callable[[str], Any]:
    def converted(text: str) -> Any:
        return text if text == AUTO else convert(text)

    converted.__name__ = getattr(convert, "__name__", str(convert))  # argparse shows this name if a value is wrong
    return converted
