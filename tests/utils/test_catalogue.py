"""The Chinese catalogue is complete: every text that is passed to `translate` is in it, and it holds no other."""

import argparse
import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from softprompt import cli, doctor
from softprompt.config import command_line as of
from softprompt.config.help_text import in_groups
from softprompt.config.loader import GROUPS, PRESET_SUMMARIES
from softprompt.evaluation.comparison_report import METRICS
from softprompt.export import args as export
from softprompt.export import push_args as push
from softprompt.generation.chat.commands import COMMANDS
from softprompt.report import args as report
from softprompt.report import charts, results, views
from softprompt.serving import args as serve
from softprompt.study import grid as study
from softprompt.utils.translation import PLACEHOLDER, catalogue

PACKAGE = Path(cli.__file__).parent
FIELDS = re.compile(r"(\{[^{}]*\})+")  # of f-strings and of str.format; neighbors count as one
CHINESE = catalogue("zh")
OTHER_COMMANDS = (export, report, serve, push, study)
GROUPS_OF_HELP = [
    *in_groups((of.StartArguments, *GROUPS)),
    *in_groups((*of.INFER_GROUPS, serve.ServeArguments, report.ReportArguments, export.ExportArguments)),
]
EVERYDAY = [field for title, some, _ in GROUPS_OF_HELP if not title.startswith("more: ") for field in some]
TABLES = {  # texts that are passed to `translate` by a variable
    "help of everyday flags": [field.metadata["help"] for field in EVERYDAY if field.name != "preset"],
    "titles of help": [title for title, _, _ in GROUPS_OF_HELP if not title.startswith("more: ")],
    "examples": [what for what, _ in (*cli.EXAMPLES, *of.TRAIN_EXAMPLES, *of.INFER_EXAMPLES, *of.CHAT_EXAMPLES)],
    "examples of other commands": [what for command in OTHER_COMMANDS for what, _ in command.EXAMPLES],
    "presets": list(PRESET_SUMMARIES.values()),
    "commands": [command.help for command in cli.COMMANDS.values()],
    "commands of a chat": [re.sub("runs/", "{}/", command.help) for command in COMMANDS.values()],
    "metrics": [metric.label for metric in results.SHOWN.values()],
    "metrics of adapters side by side": METRICS,
    "what packages are for": list(doctor.USED_FOR.values()),
    "parts of a report": [*views.SECTIONS.values(), *results.WHY_EARLY.values()],
    "charts": [*charts.LOSSES.values(), *charts.QUALITY.values(), *charts.COURSE.values()],
}


def plain(text: str) -> str:
    """Return a text with each placeholder as {}, and its first letter small."""
    text = FIELDS.sub("{}", text)
    return text[:1].lower() + text[1:]


def written(node: ast.AST) -> list[str]:
    """Return the texts, as templates, that an expression may be: a literal, an f-string, or a choice between them."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.JoinedStr):
        return ["".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)]
    return [*written(node.body), *written(node.orelse)] if isinstance(node, ast.IfExp) else []


def nodes() -> Iterator[ast.AST]:
    for file in PACKAGE.rglob("*.py"):
        yield from ast.walk(ast.parse(file.read_text(encoding="utf-8")))


@cache
def shown() -> set[str]:
    """Return the literal arguments of `translate` in the package, and of `_` in the templates of pages."""
    called = (node for node in nodes() if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "translate")
    found = {text for call in called for argument in call.args for text in written(argument)}
    for file in (PACKAGE / "report").glob("*.jinja"):
        found |= set(re.findall(r"\b_\('([^']*)'", file.read_text(encoding="utf-8")))
    return {plain(text) for text in found}


@cache
def sources() -> set[str]:
    """Return all texts of the package and of argparse as templates, and their parts, which "; " or line breaks join."""
    whole = {text for node in nodes() for text in written(node)}
    whole |= {field.metadata["help"] for field in EVERYDAY}
    whole |= {"{}: " + re.sub(r"%\(\w+\)[rs]", "{}", text) for text in _literals_of(argparse)}
    parts = {part for text in whole for mark in ("; ", "\n") for part in text.split(mark)}
    return {plain(text) for text in whole | parts} | shown()


def _literals_of(module: object) -> set[str]:
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))  # type: ignore[attr-defined]
    return {text for node in ast.walk(tree) for text in written(node)}


def is_made_of(key: str, source: str) -> bool:
    """Whether `key` is the template `source` with words in place of some placeholders, most of it being of `source`."""
    known = source.replace("{}", "")
    if 2 * len(known) < len(key.replace("{}", "")) or "{}" not in source:
        return False
    return re.fullmatch(".*".join(map(re.escape, source.split("{}"))), key, re.DOTALL) is not None


def test_every_shown_text_has_a_translation():
    missing = shown() - {plain(key) for key in CHINESE}
    assert not missing, f"missing in locale/zh.json: {sorted(missing)}"


@pytest.mark.parametrize("table", TABLES)
def test_every_text_of_a_table_has_a_translation(table: str):
    missing = {plain(text) for text in TABLES[table]} - {plain(key) for key in CHINESE}
    assert TABLES[table] and not missing, f"missing in locale/zh.json: {sorted(missing)}"


def test_every_key_is_a_text_of_the_package():
    known = sources()
    unknown = [key for key in CHINESE if plain(key) not in known]
    stale = [key for key in unknown if not any(is_made_of(plain(key), source) for source in known)]
    stale = [key for key in stale if key != ", or "]  # joins the last two of several
    assert not stale, f"in locale/zh.json, but in no message of the package: {stale}"


def test_a_translation_is_chinese_and_has_the_placeholders_of_its_key():
    for key, chinese in CHINESE.items():
        names, used = ({place[0] for place in PLACEHOLDER.findall(text)} for text in (key, chinese))
        assert used <= names and all(name.startswith("_") for name in names - used), key
        is_sentence = re.search(r"[a-z]{3} [a-z]{3}", PLACEHOLDER.sub("", key))
        assert not is_sentence or re.search(r"[\u4e00-\u9fff]", chinese), key
