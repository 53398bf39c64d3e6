"""Dataclass fields as settings: each with a default, a help text, and a type that values are checked against."""

import difflib
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field, fields
from datetime import date
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from softprompt.config.unknown_names import advice
from softprompt.utils.errors import ConfigError

AUTO = "auto"  # value of a setting that the program is to choose
PATHS = {
    *("model_name_or_path", "offload_folder", "dataset", "eval_dataset", "init_adapter", "output_dir", "output"),
    *("distill_prompt", "distill_context"),
    *("adapters", "resume_from_checkpoint", "adapter", "prompts_file", "output_file"),
}


def option(default: Any, help: str, metavar: str | None = None, secret: bool = False) -> Any:
    """Return a dataclass field that becomes a flag of the same name.

    Args:
        metavar: What `--help` calls the flag's value; None means a letter for its type (`arg_parser.METAVARS`).
        secret: Leave the value out of the dataclass's repr.
    """
    return field(default=default, repr=not secret, metadata={"help": help, "metavar": metavar})


def same_option(group: type, name: str) -> Any:
    """Return a new field like that of `name` in another dataclass: Python does not allow two dataclasses to share
    one."""
    shared = next(f for f in fields(group) if f.name == name)
    return field(default=shared.default, repr=shared.repr, metadata=dict(shared.metadata))


def setting_types(groups: Sequence[type]) -> dict[str, Any]:
    """Return the type of every setting in the dataclasses `groups`, by its name."""
    return {f.name: get_type_hints(group)[f.name] for group in groups for f in fields(group)}


def build(groups: Sequence[type], values: dict[str, Any]) -> list[Any]:
    """Return one instance of each dataclass, from settings with the names of the flags.

    Raises:
        ConfigError: Unknown settings, or values that are not of their field's type; the message names all of them.
    """
    known, values = setting_types(groups), expand_paths(values)
    faults = [f"unknown setting {name!r}{advice(name, known)}" for name in values if name not in known]
    values = {name: _coerced(value, known[name]) for name, value in values.items() if name in known}
    if faults := faults + type_faults(values, known):
        raise ConfigError("; ".join(faults))
    return [group(**{f.name: values[f.name] for f in fields(group) if f.name in values}) for group in groups]


def expand_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with path objects as strings and a leading ~ expanded. A shell does not expand it in a config
    file, in Python or after `--flag=`."""
    return {name: _plain_path(value) if name in PATHS else value for name, value in values.items()}


def _plain_path(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain_path(each) for each in value]
    if isinstance(value, os.PathLike):
        value = os.fsdecode(value)
    return os.path.expanduser(value) if isinstance(value, str) else value


def type_faults(values: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """Return a message for each of `values` that is not of the type that `known` gives for its name."""
    values = {name: _coerced(value, known[name]) for name, value in values.items()}
    wrong = {name: value for name, value in values.items() if not _fits(value, known[name])}
    return [f"--{name} {value!r} is not {_expected(known[name])}" for name, value in wrong.items()]


def is_text(value: Any) -> bool:
    """Return whether `value` is a string that UTF-8 can encode. A lone surrogate, which can come from a
    JSON escape or from a shell with another encoding, can be neither tokenized nor written."""
    return isinstance(value, str) and not re.search(r"[\ud800-\udfff]", value)


def closest_name(name: str, known: Iterable[str]) -> str:
    """Return a clause that suggests the known name most similar to `name`, or "" if none is similar."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {found[0]}?" if found else ""


def takes_auto(hint: Any) -> bool:
    """Return whether a setting of this type may be given as `auto`, so that the program chooses its value."""
    return type(None) in union_members(hint) and str not in union_members(hint) and not takes_list(hint)


def takes_list(hint: Any) -> bool:
    """Return whether a setting of this type takes several values."""
    return any(get_origin(member) is list for member in union_members(hint))


def union_members(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union type; of another type, the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)  # Literal[…] | None is a Union


def _coerced(value: Any, hint: Any) -> Any:
    """Convert `value` as users expect: an int to a float, a single value to a list, a date (which TOML has) to a string
    if the setting is one, and `auto` to None unless it is one."""
    if type(value) is str and value == AUTO and takes_auto(hint):
        return None
    if takes_list(hint) and value is not None:
        return list(value) if isinstance(value, list | tuple) else [value]
    if isinstance(value, date) and str in union_members(hint):
        return value.isoformat()
    return float(value) if float in union_members(hint) and type(value) is int else value


def _fits(value: Any, hint: Any) -> bool:
    for member in union_members(hint):
        if get_origin(member) is Literal:
            if type(value) is str and value in get_args(member):
                return True
        elif get_origin(member) is list:
            if isinstance(value, list) and all(_fits(each, get_args(member)[0]) for each in value):
                return True
        elif type(value) is member:
            return math.isfinite(value) if member is float else member is not str or is_text(value)
    return False


def _expected(hint: Any) -> str:
    names = {str: "a text in UTF-8", int: "a whole number", float: "a finite number", bool: "true or false"}
    choices = [c for m in union_members(hint) if get_origin(m) is Literal for c in get_args(m)]
    if takes_list(hint):
        each = next(get_args(m)[0] for m in union_members(hint) if get_origin(m) is list)
        return f"one or several, each {names[each]}"
    return (
        f"one of {', '.join(choices)}" if choices else " or ".join(names[m] for m in union_members(hint) if m in names)
    )
