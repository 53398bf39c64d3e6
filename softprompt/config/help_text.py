"""The text of `--help`: the help of each flag, and the layout."""

import argparse
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from softprompt.config.schema import takes_list, union_members
from softprompt.utils.text_table import display_width, wrap
from softprompt.utils.translation import translate

Presets = Mapping[str, Mapping[str, Any]]
Examples = Sequence[tuple[str, str]]  # (what a command does, its arguments)
METAVARS = {int: "N", float: "X", str: "TEXT"}
MAX_CHOICES_WIDTH = 32  # maximum columns of `a,b,…` after a flag; longer choices are listed only in the help text
COMMAND_INDENT = "    "  # marks the lines of an epilog that are commands


class HelpFormatter(argparse.HelpFormatter):
    """Lays out `--help`: line breaks in texts are kept, a Chinese character is two columns wide, and switches are shown
    without the value that they may have."""

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: str | None = None) -> None:
        super().add_usage(usage, actions, groups, translate("usage: ") if prefix is None else prefix)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if is_switch(action):
            return ", ".join(action.option_strings)
        return super()._format_action_invocation(action)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return [line for paragraph in text.split("\n") for line in _wrapped(paragraph, width)]

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = []
        for paragraph in text.split("\n"):
            is_command = paragraph.startswith(COMMAND_INDENT)
            lines += _command_lines(paragraph, width) if is_command else _wrapped(paragraph, width)
        return "\n".join(indent + line for line in lines)


def is_switch(action: argparse.Action) -> bool:
    """Return whether a flag is usually given without a value: `--flag` alone turns it on."""
    return action.const is True


def value_name(hint: Any, metavar: str | None) -> str:
    """Return what `--help` calls the value of a flag of this type."""
    if metavar is not None:
        return metavar
    if choices := choices_of(hint):
        return "{" + ",".join(choices) + "}" if _shows_choices(choices) else "NAME"
    members = [member for member in union_members(hint) if member is not type(None)]
    return METAVARS.get(get_args(members[0])[0] if takes_list(hint) else members[0], "TEXT")


def choices_of(hint: Any) -> list[str]:
    """Return the values of a setting that takes only certain texts; an empty list for any other."""
    return [choice for kind in union_members(hint) if get_origin(kind) is Literal for choice in get_args(kind)]


def flag_help(field: dataclasses.Field[Any], hint: Any, presets: Presets) -> str:
    """Return the help text of a flag for argparse: the text of its field, the choices that this text does not name, the
    default, and the values of presets that differ from it."""
    help, default = field.metadata["help"], field.default
    text = "\n".join(map(translate, help.split("\n")))
    more = str if text == help else translate  # so that a text without a translation is entirely in English
    choices = choices_of(hint)
    if not all(choice in help for choice in choices) and not _shows_choices(choices):
        text += more(f" One of {', '.join(choices)}.")
    if default is not None and "(default" not in help:
        text += more(f" (default: {_shown(default)})")
    of_presets = [
        more(f"{_shown(values[field.name])} with --preset {name}")
        for name, values in presets.items()
        if values.get(field.name, default) != default
    ]
    if of_presets and "the preset's" not in help:  # --preset lists these
        end = more(")")
        text = f"{text.removesuffix(end)}{more('; ')}{more(', ').join(of_presets)}{end}"
    return text.replace("%", "%%")


def preset_help(presets: Presets, summaries: Mapping[str, str]) -> str:
    """Return the help text of `--preset`, which says what each preset holds."""
    lines = ["Start from the settings of a preset, which other flags override:"]
    for name, values in presets.items():
        flags = " ".join(f"--{key}={_shown(value)}" for key, value in values.items())
        lines.append(f"  {name}: {summaries[name]} ({flags})")
    return "\n".join([*lines, "(default: mini; none if --model_name_or_path is given)"])


def examples_text(command: str, examples: Examples) -> str:
    """Return the end of `--help`: commands to copy, each below what it does."""
    lines = []
    for what, arguments in examples:
        lines += [f"  {translate(what)}:", f"{COMMAND_INDENT}{f'{command} {arguments}'.rstrip()}"]
    return "\n".join([translate("examples:"), *lines])


def _shows_choices(choices: Sequence[str]) -> bool:
    return len(",".join(choices)) <= MAX_CHOICES_WIDTH


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _wrapped(paragraph: str, width: int) -> list[str]:
    indent = paragraph[: len(paragraph) - len(paragraph.lstrip())]
    return wrap(paragraph, width, f"{indent}  " if indent else "")


def _command_lines(text: str, width: int) -> list[str]:
    """Break a command before flags, with backslashes, so that it can still be copied into a shell."""
    lines: list[str] = []
    for part in re.split(r" (?=--)", text):
        if lines and display_width(f"{lines[-1]} {part}") <= width - 2:
            lines[-1] += f" {part}"
        else:
            lines.append(f"{COMMAND_INDENT}  {part}" if lines else part)
    return [*(f"{line} \\" for line in lines[:-1]), lines[-1]]


def in_groups(groups: Iterable[type]) -> list[tuple[str, list[dataclasses.Field[Any]], type]]:
    """Return the groups of `--help`: (title, flags, dataclass).

    First come the flags that a dataclass names in `_everyday`, in that order, group by group; then the others. A
    dataclass without `_everyday` has only flags of the first kind.
    """
    first, more = [], []
    for group in groups:
        known = {field.name: field for field in dataclasses.fields(group)}
        everyday = getattr(group, "_everyday", tuple(known))
        title = group._argument_group_name  # type: ignore[attr-defined]
        first.append((title, [known[name] for name in everyday], group))
        more.append((f"more: {title}", [field for name, field in known.items() if name not in everyday], group))
    return [*first, *(part for part in more if part[1])]
