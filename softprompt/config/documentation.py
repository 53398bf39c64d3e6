"""The signature and the docstring of a Python function that takes settings as keyword arguments, as `help`, editors and
Jupyter's Shift-Tab show them. They are made from the dataclasses of the settings."""

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from softprompt.config.schema import union_members

Function = TypeVar("Function", bound=Callable[..., Any])
Presets = Mapping[str, Mapping[str, Any]]
WIDTH = 100


def documented(groups: Sequence[type], presets: Presets) -> Callable[[Function], Function]:
    """Return a decorator of a function that takes the fields of the dataclasses `groups` as `**settings`.

    It replaces `**settings` in the signature by one keyword-only parameter per field with its default, and adds to the
    docstring a list of all fields with their types, defaults and help texts, and the values that `presets` give them.
    """

    def decorate(function: Function) -> Function:
        plain = inspect.signature(function)
        own = [p for p in plain.parameters.values() if p.kind is not p.VAR_KEYWORD]
        fields = [field for group in groups for field in dataclasses.fields(group)]
        of_settings = [inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default) for f in fields]
        function.__signature__ = plain.replace(parameters=[*own, *of_settings])  # type: ignore[attr-defined]
        listed = "\n".join(["Settings:", *_described(groups, presets)])
        function.__doc__ = f"{inspect.cleandoc(str(function.__doc__))}\n\n{listed}\n"
        return function

    return decorate


def _described(groups: Sequence[type], presets: Presets) -> Iterator[str]:
    """Yield the lines of all settings, with the name, type, default and help text of each."""
    names = {field.name for group in groups for field in dataclasses.fields(group)}
    for group in groups:
        types = get_type_hints(group)
        yield f"\n  {group._argument_group_name}"  # type: ignore[attr-defined]
        for field in dataclasses.fields(group):
            of_presets = [
                f"{values[field.name]!r} with preset {name}" for name, values in presets.items() if field.name in values
            ]
            default = "; ".join([repr(field.default), *of_presets])
            yield f"    {field.name}: {_type(types[field.name])} = {default}"
            yield textwrap.indent(textwrap.fill(_in_python(field.metadata["help"], names), WIDTH), " " * 8)


def _in_python(text: str, names: Collection[str]) -> str:
    """Return a help text in which the flags `names` are written as keyword arguments: dataset for --dataset, and
    bf16=False for --bf16 false."""

    def argument(flag: re.Match[str]) -> str:
        if flag[1] not in names:
            return flag[0]
        return flag[1] + (f"={flag[2].strip().capitalize()}" if flag[2] else "")

    return re.sub(r"--(\w+)( true| false)?", argument, text)


def _type(hint: Any) -> str:
    """Return a type as it is written in Python; of a setting that takes only certain texts, these texts."""
    names = []
    for member in union_members(hint):
        if get_origin(member) is Literal:
            names += [repr(choice) for choice in get_args(member)]
        else:
            names.append("None" if member is type(None) else getattr(member, "__name__", str(member)))
    return " | ".join(names)
