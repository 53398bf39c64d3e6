"""Translation of the texts that users read: English, or Chinese from the catalogue locale/zh.json.

Messages are written in English; exceptions and data files always contain the English text. It is passed through
`translate` only where it is shown (terminal, --help, report page). A key of the catalogue is an English text in which
{name} stands for any text, as in f-strings:

    "{path}: no such file": "{path}：没有这个文件"

The section "joints" has separators, such as "; "; the parts of a text between them are translated one by one. A text
without a translation stays English as a whole. {name!t} in a translation inserts the translation of what {name} stands
for; if that has none, the whole text stays English. A translation may leave out a name that begins with an underscore,
such as a plural's ending.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from softprompt.utils.errors import ConfigError

FLAG, VARIABLE = "--lang", "SOFTPROMPT_LANG"
LANGUAGES = ("en", "zh")
HELP = f"Show help, messages and reports in this language. (default: {VARIABLE}, else the locale's, else en)"
LOCALE_VARIABLES = ("LC_ALL", "LC_MESSAGES", "LANG")
CLAUSES = "; "  # joins the clauses of a message; a placeholder stands for text within one of them
PLACEHOLDER = re.compile(r"\{(\w+)(!t)?\}")
HTML_NAMES = {"en": "en", "zh": "zh-CN"}
_chosen: str | None = None  # by --lang


class Template(NamedTuple):
    """A key of the catalogue that has placeholders, as a pattern, and its translation."""

    pattern: re.Pattern[str]
    translation: str


def language() -> str:
    """Return the language of what is shown: that of --lang, else of SOFTPROMPT_LANG, else of the locale."""
    locale = next((value for name in LOCALE_VARIABLES if (value := os.environ.get(name))), "")
    return _chosen or _known(os.environ.get(VARIABLE, "")) or _known(locale) or "en"


def choose_language(argv: Sequence[str]) -> list[str]:
    """Take --lang out of the arguments of a command, and show everything in its language from now on. Without it, the
    environment decides.

    Raises:
        ConfigError: The language is unknown.
    """
    global _chosen
    given, rest, words = None, [], iter(argv)
    for word in words:
        if word == FLAG:
            given = next(words, "")
        elif word.startswith(f"{FLAG}="):
            given = word.removeprefix(f"{FLAG}=")
        else:
            rest.append(word)
    _chosen = _checked(FLAG, given)
    _checked(VARIABLE, os.environ.get(VARIABLE) or None)
    return rest


def _checked(source: str, given: str | None) -> str | None:
    if given is not None and not _known(given):
        raise ConfigError(f"{source} {given}: expected one of {', '.join(LANGUAGES)}")
    return given and _known(given)


def _known(name: str) -> str | None:
    """Return the language that a name such as zh, zh_CN.UTF-8 or zh-Hans means; None for another one."""
    name = re.split(r"[^a-z]", name.lower())[0]
    return name if name in LANGUAGES else None


def translate(text: str) -> str:
    """Return an English text in the language of `language`, or unchanged if there is no translation."""
    chosen = language()
    return text if chosen == "en" else _translation(text, chosen) or text


def translate_error(message: str) -> str:
    """Return the line that reports an error: the message and the word "error", both translated or both not."""
    made = None if language() == "en" else _translation(message, language())
    return f"error: {message}" if made is None else translate("error: ") + made


def _translation(text: str, chosen: str) -> str | None:
    exact, templates = _catalogue(chosen)
    if text in exact:
        return exact[text]
    if made := _in_parts(text, chosen, CLAUSES):
        return made
    for template in templates:
        if (found := template.pattern.fullmatch(text)) and (made := _filled(template, found.groupdict(), chosen)):
            return made
    return _in_parts(text, chosen, *_joints(chosen))


def _in_parts(text: str, chosen: str, *joints: str) -> str | None:
    """Translate the parts of a text that a separator (`joints`) joins, and join the translations. Return None if no
    separator occurs, or a part has no translation."""
    for joint in joints:
        if joint in text and None not in (parts := [_translation(part, chosen) for part in text.split(joint)]):
            return _joints(chosen)[joint].join(map(str, parts))
    return None


def _filled(template: Template, values: Mapping[str, Any], chosen: str) -> str | None:
    """Return the translation with its placeholders filled in; None if a value should be translated and cannot be."""
    parts, end = [], 0
    for place in PLACEHOLDER.finditer(template.translation):
        value = values[place[1]]
        if place[2] and value:
            value = _translation(value, chosen)
        elif CLAUSES in value:  # the value spans several clauses, so the template does not match the message
            value = None
        if value is None:
            return None
        parts += [template.translation[end : place.start()], value]
        end = place.end()
    return "".join([*parts, template.translation[end:]])


@cache
def _catalogue(chosen: str) -> tuple[dict[str, str], list[Template]]:
    """Return the texts without placeholders, and the templates, those with most text outside of placeholders first."""
    texts = catalogue(chosen)
    keys = sorted((key for key in texts if PLACEHOLDER.search(key)), key=lambda key: -len(PLACEHOLDER.sub("", key)))
    return texts, [Template(_pattern(key), texts[key]) for key in keys]


def _pattern(key: str) -> re.Pattern[str]:
    parts, end, names = [], 0, set()
    for place in PLACEHOLDER.finditer(key):
        same = f"(?P={place[1]})" if place[1] in names else f"(?P<{place[1]}>.*?)"
        parts += [re.escape(key[end : place.start()]), same]
        names.add(place[1])
        end = place.end()
    return re.compile("".join([*parts, re.escape(key[end:])]), re.DOTALL)


@cache
def _joints(chosen: str) -> dict[str, str]:
    return _sections(chosen)["joints"]


def catalogue(chosen: str) -> dict[str, str]:
    """Return all texts of a language's catalogue by the English texts."""
    return {key: text for section in _sections(chosen).values() for key, text in section.items()}


def _sections(chosen: str) -> dict[str, dict[str, str]]:
    file = Path(__file__).parents[1] / "locale" / f"{chosen}.json"
    return json.loads(file.read_text(encoding="utf-8"))
