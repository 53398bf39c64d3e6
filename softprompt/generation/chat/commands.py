"""The commands of a chat: each changes the session and returns the text to display."""

import os
import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import fields
from typing import Any, NamedTuple

from softprompt.config.adapter_specs import NONE
from softprompt.config.arg_parser import parse_setting
from softprompt.config.infer_args import GenerationArguments
from softprompt.config.schema import AUTO, closest_name, setting_types, union_members
from softprompt.config.train_args import RUNS
from softprompt.config.unknown_names import advice
from softprompt.config.value_parsers import parse_labels
from softprompt.data.template import CHAT
from softprompt.generation.adapters import LoadedAdapter
from softprompt.generation.chat.messages import LEAVE, Message, unquoted
from softprompt.generation.chat.session import ChatSession, short_name
from softprompt.generation.likelihood import check_choices
from softprompt.runs.adapter_search import adapters_under
from softprompt.utils.errors import AdapterError, ConfigError
from softprompt.utils.text_table import aligned
from softprompt.utils.translation import translate

LEAVING = (LEAVE, "/bye", "/quit")
HELP = ("/help", "/?")


class Command(NamedTuple):
    """A command.

    Attributes:
        run: Runs the command with the text after its name, and returns the text to display, without a line break at its
            end.
        usage: The command with its arguments, as /help shows it.
        help: What it does.
        aliases: Other names.
        complete: Yields possible completions of the text after the command's name.
    """

    run: Callable[[ChatSession, str], str]
    usage: str
    help: str
    aliases: tuple[str, ...] = ()
    complete: Callable[[ChatSession, str], Iterable[str]] = lambda session, text: ()


def run_command(session: ChatSession, message: Message) -> str:
    """Run a command and return the text to display.

    Raises:
        SoftpromptError: There is no such command, or its argument is wrong.
    """
    if (command := _find(message.command)) is None:
        near = closest_name(message.command, COMMANDS)
        advice = '/? lists them; put """ around a text to send it as a question'
        raise ConfigError(f"no command {message.command}{near}; {advice}")
    return command.run(session, message.text)


def completions(session: ChatSession, line: str) -> list[str]:
    """Return possible completions of the line up to the cursor, as whole lines."""
    name, space, text = line.partition(" ")
    if not space:
        return [each for each in (*COMMANDS, *LEAVING) if each.startswith(line)] if line else []
    if (command := _find(name)) is None:
        return []
    return [f"{name} {each}" for each in dict.fromkeys(command.complete(session, text)) if each.startswith(text)]


def describe_turns(session: ChatSession) -> str:
    """Return one line that says which turns precede a question."""
    n = session.history
    if n is None and session.template.spec == CHAT:
        return translate("Earlier turns precede each question, as in the chat template; /clear forgets them.")
    if not n:
        alone = "Each question is answered by itself, as in training; /history N puts earlier turns before it."
        return translate(alone)
    turns = "turn precedes" if n == 1 else f"{n} turns precede"
    return translate(f"The last {turns} each question; /history 0 ends that.")


def _find(name: str) -> Command | None:
    return COMMANDS.get(name) or next((each for each in COMMANDS.values() if name in each.aliases), None)


def _help(session: ChatSession, text: str) -> str:
    rows = [(command.usage, translate(command.help)) for command in COMMANDS.values()]
    return aligned([*rows, (", ".join(LEAVING), translate("leave, as Ctrl-D and the line `exit` do"))])


def _adapter(session: ChatSession, text: str) -> str:
    if not text:
        return _adapters(session, text)
    session.use_adapter(unquoted(text))
    return describe_turns(session)


def _base(session: ChatSession, text: str) -> str:
    session.use_adapter(NONE)
    return describe_turns(session)


def _adapters(session: ChatSession, text: str) -> str:
    """List the loaded adapters and those under runs/, each run with its final adapter, else its last checkpoint."""
    loaded = {name: adapter for name, adapter in session.model.adapters.items() if name != NONE}
    rows = [_adapter_row(session, name, adapter) for name, adapter in loaded.items()]
    for folder in _runs():
        if folder not in loaded:
            try:
                rows.append(_adapter_row(session, folder, LoadedAdapter.from_folder(folder)))
            except AdapterError as error:
                rows.append((f"  {folder}", translate(f"cannot be read: {error}"), ""))
    return aligned([*rows, _adapter_row(session, NONE, LoadedAdapter())])


def _adapter_row(session: ChatSession, name: str, adapter: LoadedAdapter) -> tuple[str, str, str]:
    tokens = "the base without a prompt" if adapter.prompt is None else f"{len(adapter.prompt)} virtual tokens"
    base = "" if adapter.base in (None, session.model.name) else translate(f"trained on {adapter.base}")
    return f"{'*' if session.adapter == name else ' '} {name}", translate(tokens), base


def _runs() -> list[str]:
    """Return the folders of the adapters under runs/, one for each run (its newest), the newest first."""
    newest: dict[str, str] = {}
    for folder in adapters_under(RUNS):
        newest.setdefault(folder.relative_to(RUNS).parts[0], str(folder))
    return list(newest.values())


def _input(session: ChatSession, text: str) -> str:
    if not text:
        session.input = None
        return translate("The input is empty again.")
    value = unquoted(text)
    session.template.row("?", value)  # raises if the template has no column for it
    session.input = value
    column = session.template.second
    return translate(f"Questions are about this input from now on ({column}); /input alone empties it.")


def _choices(session: ChatSession, text: str) -> str:
    if not text:
        session.choices = []
        return translate("Answers are generated.")
    choices = parse_labels(text)
    check_choices(choices)
    session.choices = choices
    return translate(f"Answers are chosen among {', '.join(choices)}; /choices alone generates them again.")


def _history(session: ChatSession, text: str) -> str:
    if text.isdecimal() or text == AUTO:
        session.history = None if text == AUTO else int(text)
    elif text:
        raise ConfigError(f"/history {text}: expected a number of earlier turns, or {AUTO} for what fits the template")
    return describe_turns(session)


def _clear(session: ChatSession, text: str) -> str:
    session.turns.clear()
    return translate("The earlier turns are forgotten.")


def _set(session: ChatSession, text: str) -> str:
    """Change a generation setting, or show one or all of them. The value `auto` restores the default."""
    name, _, value = (text if " " in text or "=" not in text else text.replace("=", " ", 1)).partition(" ")
    name = name.lstrip("-").replace("-", "_")
    shown = _settings(session)
    if not name:
        return aligned(list(shown.items()))
    if name not in shown:
        raise ConfigError(f"unknown setting {name}{advice(name, shown)}; /set alone lists them")
    if value.strip():
        others = {other: given for other, given in session.given.items() if other != name}
        changed = others if value.strip() == AUTO else {**others, **parse_setting(name, value.strip())}
        session.model.settings(session.adapter, **changed)  # raises if the value is invalid
        session.given = changed
    return f"{name} {_settings(session)[name]}"


def _settings(session: ChatSession) -> dict[str, str]:
    """Return the settings of the next answer as texts that /set accepts, by name."""
    settings = session.settings
    return {field.name: _as_text(getattr(settings, field.name)) for field in fields(settings)}


def _as_text(value: Any) -> str:
    if value is None or value == ():
        return AUTO
    if isinstance(value, tuple):
        return shlex.join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _adapters_to_complete(session: ChatSession, text: str) -> Iterator[str]:
    loaded = session.model.adapters
    yield from (short_name(name, loaded) for name in loaded)
    yield from (NONE, *loaded, *_runs())
    head, _ = os.path.split(text)
    with suppress(OSError):
        folders = sorted(entry.name for entry in os.scandir(os.path.expanduser(head) or ".") if entry.is_dir())
        yield from (os.path.join(head, name, "") for name in folders if not name.startswith("."))


def _settings_to_complete(session: ChatSession, text: str) -> Iterator[str]:
    name, space, _ = text.partition(" ")
    if not space:
        yield from _settings(session)
    elif bool in union_members(setting_types([GenerationArguments]).get(name)):
        yield from (f"{name} true", f"{name} false", f"{name} {AUTO}")


COMMANDS = {
    "/adapter": Command(
        _adapter,
        "/adapter NAME",
        "answer with another adapter: a name that /adapters lists, or a folder",
        complete=_adapters_to_complete,
    ),
    "/adapters": Command(_adapters, "/adapters", f"list the loaded adapters and those under {RUNS}/"),
    "/base": Command(_base, "/base", "answer with the base alone, without a soft prompt"),
    "/input": Command(_input, "/input TEXT", "fill the second column of the template; alone, empty it again"),
    "/choices": Command(_choices, "/choices A,B", "answer with the most likely one of these; alone, generate answers"),
    "/history": Command(_history, "/history N", "put the last N turns before each question"),
    "/clear": Command(_clear, "/clear", "forget the earlier turns"),
    "/set": Command(
        _set,
        "/set NAME VALUE",
        "change a setting, such as /set temperature 0.7; alone, show all settings",
        complete=_settings_to_complete,
    ),
    "/help": Command(_help, ", ".join(HELP), "show this help", HELP[1:]),
}
