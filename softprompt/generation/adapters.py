"""Adapters by name: what a question may be put behind."""

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from softprompt.config.schema import AUTO, is_text
from softprompt.config.train_args import RUNS
from softprompt.data.dataset import Row
from softprompt.data.template import Template, saved_template
from softprompt.generation.encode_questions import Question, encoded, merged_settings
from softprompt.models.loading import base_path
from softprompt.prompt.adapter_io import Adapter, load_adapter, newest_adapter
from softprompt.prompt.file_names import SETTINGS_FILE
from softprompt.prompt.initial import check_fits
from softprompt.utils.errors import AdapterError, ConfigError

NONE = "none"  # the bare base
Names = str | Sequence[str] | None  # one for all questions, one for each, or the one that is active


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """A learned prompt [P, H] fp32 (None: the bare base), the template that it was learned with, its settings for
    answers, the name of the base that it was learned for, and how the rows that it was learned from were read and cut
    (train.py's defaults where the adapter does not say)."""

    prompt: Tensor | None = None
    template: Template = field(default_factory=Template)
    generation: Mapping[str, Any] = field(default_factory=dict)
    base: str | None = None
    max_length: int = 256
    truncation_side: str = "output"
    columns: Mapping[str, str] = field(default_factory=dict)


class EncodedQuestion(NamedTuple):
    """A question as it is put to the base: how messages name it, its adapter's name, that adapter, its row, and its
    token ids in the adapter's template."""

    where: str
    name: str
    tuned: LoadedAdapter
    row: Row
    ids: list[int]


def load(folder: str | Path) -> LoadedAdapter:
    """Read an adapter folder, ours or PEFT's.

    Raises:
        AdapterError: as of `checkpoint.load_adapter`, or settings beside it that are none.
    """
    return tuned_of(folder, load_adapter(folder))


def tuned_of(folder: str | Path, adapter: Adapter) -> LoadedAdapter:
    """An adapter that was read from `folder`.

    Raises:
        AdapterError: settings beside it that are none.
    """
    place = Path(folder) / SETTINGS_FILE
    generation = adapter.settings.get("generation", {})
    if not isinstance(generation, dict) or None in generation.values() or AUTO in generation.values():
        raise AdapterError(
            f"{place}: generation must be an object of settings with values, not {generation!r:.200}; mend it, or take "
            "it out"
        )
    try:
        merged_settings(generation, {})
        template = saved_template(adapter.settings)
    except ConfigError as error:
        raise AdapterError(f"{place}: {error}; mend it there, or take it out") from None
    rows = _rows_settings(place, adapter.settings)
    return LoadedAdapter(adapter.prompt, template, generation, adapter.base_model_name_or_path, **rows)


def _rows_settings(place: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """How the rows of the training were read and cut, as far as the file at `place` says it."""
    columns = settings.get("columns", {})
    of_texts = isinstance(columns, dict) and all(map(is_text, [*columns, *columns.values()]))
    length = settings.get("max_length", 1)
    expected = {
        "max_length": ("a whole number above 0", type(length) is int and length > 0),
        "truncation_side": ("output or input", settings.get("truncation_side", "output") in ("output", "input")),
        "columns": ("an object of column names", of_texts),
    }
    for name, (what, good) in expected.items():
        if not good:
            raise AdapterError(
                f"{place}: {name} must be {what}, not {settings[name]!r:.200}; mend it there, or take it out"
            )
    return {name: settings[name] for name in expected if name in settings}


def check_name(name: str, folder: str | Path) -> None:
    """Raises AdapterError for a name that cannot be an adapter's: none, which is the bare base, or an empty one."""
    if not name or (name == NONE and str(folder) != NONE):
        raise AdapterError(
            f"adapter {folder}: cannot be named {name!r}"
            + (", which is the bare base" if name else "")
            + "; give it another name"
        )


def parse_adapter_specs(specs: Iterable[str | os.PathLike[str]]) -> dict[str, str]:
    """`FOLDER`, `name=FOLDER` or `none`, as --adapter takes them → folders by name; a folder's own name is its path.

    Raises:
        AdapterError: a name without a folder, one that is given twice, or a folder under the name none.
    """
    folders: dict[str, str] = {}
    for spec in map(os.fspath, specs):
        name, equals, folder = spec.partition("=")
        folder = os.path.expanduser(folder)
        if not equals or Path(spec).exists():  # a folder's path may hold a =
            name = folder = spec
        if not name or not folder or (name == NONE and folder != NONE):
            raise AdapterError(f"--adapter {spec}: expected FOLDER, name=FOLDER or none (which is the bare base)")
        if name in folders:
            raise AdapterError(f"--adapter {name} is there twice; give each a name of its own, name=FOLDER")
        folders[name] = folder
    return folders


def load_adapters(folders: Mapping[str, str] | None, base: str | None) -> tuple[dict[str, LoadedAdapter], str, str]:
    """Load adapters: those by name, the first name, and the base's name: the one given, else the one that they name.
    Without folders the newest adapter under runs/ is taken; for the bare base alone, its base and its template.

    Raises:
        AdapterError: no such adapter, a broken one, a name that cannot be one, none that names a base, or several for
            several bases.
    """
    folders = folders or {str(newest := newest_adapter(RUNS)): str(newest)}
    for name, folder in folders.items():
        check_name(name, folder)
    loaded = {name: LoadedAdapter() if folder == NONE else load(folder) for name, folder in folders.items()}
    named_bases: dict[str, tuple[str, str]] = {}
    for name, tuned in loaded.items():
        if tuned.base:
            named_bases.setdefault(base_identity(tuned.base), (name, tuned.base))
    if base is None and len(named_bases) > 1:
        told = ", ".join(f"{name} for {other}" for name, other in named_bases.values())
        raise AdapterError(f"the adapters are for several bases: {told}; ask those of one base at a time")
    if base is None and set(folders.values()) == {NONE}:
        newest_one = load(newest_adapter(RUNS))
        base, loaded = newest_one.base, dict.fromkeys(loaded, replace(newest_one, prompt=None))
    found = base or next((other for _, other in named_bases.values()), None)
    if found is None:
        raise AdapterError(f"adapter {next(iter(folders.values()))}: names no base; give --model_name_or_path")
    return loaded, next(iter(folders)), found


def base_identity(base: str) -> str:
    """What tells a base from another: where its folder is, however that is spelt, or its hub id."""
    path = Path(base_path(base))
    return str(path.resolve()) if path.is_dir() else base


def check_adapter(name: str, tuned: LoadedAdapter, hidden_size: int, base: str) -> None:
    """Raises AdapterError where a prompt is of another hidden size than the base; another base only warns."""
    if tuned.prompt is not None:
        check_fits(name, tuned.prompt, hidden_size, base)
        if tuned.base and base_identity(tuned.base) != base_identity(base):
            print(f"warning: adapter {name} was trained on {tuned.base}, not on {base}", file=sys.stderr)


def find_adapter(adapters: Mapping[str, LoadedAdapter], name: str, where: str) -> LoadedAdapter:
    """Raises AdapterError, naming the question and the adapters there are, where `name` is none of them."""
    if name not in adapters:
        known = ", ".join(dict.fromkeys([*adapters, NONE]))
        raise AdapterError(f"{where}: unknown adapter {name!r}; known are {known}, and folders")
    return adapters[name]


def encode_questions(
    prompts: Sequence[Question],
    adapters: Mapping[str, LoadedAdapter],
    active: str,
    names: Names,
    where: Sequence[str] | None,
    tokenizer: Any,
) -> list[EncodedQuestion]:
    """Questions behind the adapters of these names, all of them checked; `where` names the questions in messages.

    Raises:
        ConfigError: names for another number of questions, or a question without a token.
        AdapterError: a name that is neither known nor `none`.
        DataError: a row without the template's columns.
    """
    places = where or [f"question {number}" for number in range(1, len(prompts) + 1)]
    each = [names] * len(places) if isinstance(names, str) or names is None else names
    chosen = [name or active for name in each]
    if len(chosen) != len(places):
        raise ConfigError(f"adapter names {len(chosen)} for {len(places)} questions; give one, or one for each")
    found = []
    for place, prompt, name in zip(places, prompts, chosen, strict=True):
        tuned = adapters.get(name, LoadedAdapter()) if name == NONE else find_adapter(adapters, name, place)
        found.append(EncodedQuestion(place, name, tuned, *encoded(place, prompt, tuned.template, tokenizer)))
    return found
