"""Load adapters by name, check them, and find the base that they belong to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from softprompt.config.adapter_specs import NONE
from softprompt.config.infer_args import GENERATION_DEFAULTS
from softprompt.config.schema import AUTO, is_text
from softprompt.config.train_args import RUNS
from softprompt.config.validation import quantization_bits
from softprompt.data.template import Template, saved_template
from softprompt.generation.requests import merge_settings
from softprompt.models.loading import base_path
from softprompt.prompt.adapter_io import Adapter, load_adapter
from softprompt.prompt.file_names import SETTINGS_FILE
from softprompt.prompt.initial import check_fits
from softprompt.runs.adapter_search import newest_adapter, no_adapter, resolve_adapter
from softprompt.utils.errors import AdapterError, ConfigError
from softprompt.utils.progress import say

QUANTIZED = ("load_in_8bit", "load_in_4bit")
AdapterNames = str | Sequence[str] | None  # one for all questions, one for each, or None: the active adapter


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """A trained soft prompt and the settings that were saved with it. `LoadedAdapter()` is the base without a prompt.

    Attributes:
        prompt: [P, H] fp32; None for the base without a prompt.
        template: The template that the prompt was trained with.
        generation: Generation settings by name, which override the defaults.
        base: Name or path of the base that the prompt was trained for.
        max_length, truncation_side, columns: How train.py read and truncated the rows; None or empty if the folder does
            not say so, which is the case if PEFT or an earlier version of this project wrote it.
        load_in_8bit, load_in_4bit: How train.py quantized the base; None if the folder does not say so.
    """

    prompt: Tensor | None = None
    template: Template = field(default_factory=Template)
    generation: Mapping[str, Any] = field(default_factory=dict)
    base: str | None = None
    max_length: int | None = None
    truncation_side: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    load_in_8bit: bool | None = None
    load_in_4bit: bool | None = None

    @classmethod
    def from_folder(cls, folder: str | Path) -> "LoadedAdapter":
        """Read an adapter folder of this project or of PEFT, or the newest checkpoint of a run that has not ended.

        Raises:
            AdapterError: There is no adapter (see `adapter_search.resolve_adapter`), it cannot be read (see
                `adapter_io.load_adapter`), or its settings are invalid.
        """
        folder = resolve_adapter(folder)
        return cls.from_files(folder, load_adapter(folder))

    @classmethod
    def from_files(cls, folder: str | Path, files: Adapter) -> "LoadedAdapter":
        """Check the settings of an adapter whose files have been read from `folder`.

        Raises:
            AdapterError: A setting is invalid.
        """
        path = Path(folder) / SETTINGS_FILE
        generation = files.settings.get("generation", {})
        if not isinstance(generation, dict) or None in generation.values() or AUTO in generation.values():
            raise AdapterError(
                f"{path}: generation must be an object of settings whose values are neither null nor auto, not "
                f"{generation!r:.200}; correct it, or take it out"
            )
        try:
            merge_settings(generation, {})
            template = saved_template(files.settings)
        except ConfigError as error:
            raise AdapterError(f"{path}: {error}; correct it there, or take it out") from None
        others = _training_settings(path, files.settings)
        return cls(files.prompt, template, generation, files.base_model_name_or_path, **others)


def _training_settings(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Check the settings in the file at `path` that say how the rows were read and how the base was loaded in training,
    and return them."""
    columns = settings.get("columns", {})
    all_texts = isinstance(columns, dict) and all(map(is_text, [*columns, *columns.values()]))
    length = settings.get("max_length", 1)
    checks = {
        "max_length": ("a whole number above 0", type(length) is int and length > 0),
        "truncation_side": ("output or input", settings.get("truncation_side", "output") in ("output", "input")),
        "columns": ("an object of column names", all_texts),
        **{name: ("true or false", type(settings.get(name, False)) is bool) for name in QUANTIZED},
    }
    for name, (expected, is_valid) in checks.items():
        if not is_valid:
            raise AdapterError(
                f"{path}: {name} must be {expected}, not {settings[name]!r:.200}; correct it there, or take it out"
            )
    return {name: settings[name] for name in checks if name in settings}


def check_name(name: str, folder: str | Path) -> None:
    """Raise AdapterError if the name is empty, or if it is `none` and the folder is not."""
    if not name or (name == NONE and str(folder) != NONE):
        raise AdapterError(
            f"adapter {folder}: cannot be named {name!r}"
            + (", which means the base without a prompt" if name else "")
            + "; give it another name"
        )


def load_adapters(folders: Mapping[str, str] | None, base: str | None) -> tuple[dict[str, LoadedAdapter], str]:
    """Load adapters and find their base.

    Args:
        folders: Folders by name, by default the newest adapter under runs/. If every folder is `none` and `base` is
            None, base and settings are those of the newest adapter, else those of the mini base.
        base: Name or path of the base; None selects the one that the adapters name.

    Returns:
        The adapters by name, and the name or path of the base.

    Raises:
        AdapterError: A folder is missing or damaged, a name is invalid, or `base` is None and the adapters name no base
            or different ones.
    """
    if not folders:
        if (newest := newest_adapter(RUNS)) is None:
            raise no_adapter(RUNS)
        folders = {str(newest): str(newest)}
    for name, folder in folders.items():
        check_name(name, folder)
    adapters = {
        name: LoadedAdapter() if folder == NONE else LoadedAdapter.from_folder(folder)
        for name, folder in folders.items()
    }
    bases: dict[str, tuple[str, str]] = {}  # by base identity: (an adapter, the base as it names it)
    for name, adapter in adapters.items():
        if adapter.base:
            bases.setdefault(base_identity(adapter.base), (name, adapter.base))
    if base is None and len(bases) > 1:
        pairs = ", ".join(f"{name} for {other}" for name, other in bases.values())
        raise AdapterError(f"the adapters are for several bases: {pairs}; ask those of one base at a time")
    if base is None and set(folders.values()) == {NONE}:
        latest = _newest_or_mini()
        base, adapters = latest.base, dict.fromkeys(adapters, replace(latest, prompt=None))
    base = base or next((other for _, other in bases.values()), None)
    if base is None:
        raise AdapterError(f"adapter {next(iter(folders.values()))}: names no base; give --model_name_or_path")
    return adapters, base


def _newest_or_mini() -> LoadedAdapter:
    """Return the newest adapter under runs/. If there is none, return the settings of a prompt for the mini base."""
    if newest := newest_adapter(RUNS):
        return LoadedAdapter.from_folder(newest)
    say(f"no trained adapter under {RUNS}/; the base is mini, unless --model_name_or_path names another")
    return LoadedAdapter(generation=GENERATION_DEFAULTS["mini"], base="mini")


def base_identity(base: str) -> str:
    """Return what identifies a base: the resolved path of its folder, else its id on the hub."""
    path = Path(base_path(base))
    return str(path.resolve()) if path.is_dir() else base


def warning_of_other_base(name: str, trained_on: str | None, base: str) -> str | None:
    """Return a warning if an adapter was trained on another base than the loaded one, else None.

    Args:
        name: Name or folder of the adapter.
        trained_on: Name or path of the base that its files name; None if they name none.
        base: Name or path of the loaded base.
    """
    if not trained_on or base_identity(trained_on) == base_identity(base):
        return None
    return f"warning: adapter {name} was trained on {trained_on}, not on {base}"


def check_adapter(name: str, adapter: LoadedAdapter, hidden_size: int, base: str, bits: int | None) -> None:
    """Check that an adapter fits the loaded base; print a warning if it was trained on another one, or on one with
    another quantization.

    Args:
        hidden_size: H of the loaded base.
        base: Its name or path.
        bits: The number of bits to which `--load_in_8bit` or `--load_in_4bit` quantized it; None without these flags.

    Raises:
        AdapterError: The prompt's hidden size differs from the base's.
    """
    if adapter.prompt is not None:
        check_fits(name, adapter.prompt, hidden_size, base)
        if warning := warning_of_other_base(name, adapter.base, base):
            say(warning)
        if adapter.load_in_8bit is not None and adapter.load_in_4bit is not None:
            trained = quantization_bits(adapter.load_in_8bit, adapter.load_in_4bit)
            if trained != bits:
                say(
                    f"warning: adapter {name} was trained {_with_flag(trained)}, and its base is loaded "
                    f"{_with_flag(bits)} now; answers may be worse than with the same flag"
                )


def _with_flag(bits: int | None) -> str:
    return f"with --load_in_{bits}bit" if bits else "without --load_in_8bit and --load_in_4bit"


def find_adapter(adapters: Mapping[str, LoadedAdapter], name: str, where: str) -> LoadedAdapter:
    """Return the adapter with this name.

    Raises:
        AdapterError: The name is unknown. The message begins with `where` and lists the known names.
    """
    if name not in adapters:
        known = ", ".join(dict.fromkeys([*adapters, NONE]))
        raise AdapterError(
            f"{where}: unknown adapter {name!r}; give one of {known}, or load its folder with --adapter or load_adapter"
        )
    return adapters[name]
