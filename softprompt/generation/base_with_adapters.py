"""A base model with named adapters, of which one is active."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from softprompt.config.adapter_specs import NONE
from softprompt.config.infer_config import generation_faults
from softprompt.data.dataset import Row
from softprompt.data.messages import texts_of
from softprompt.data.template import Template
from softprompt.generation.adapters import LoadedAdapter, check_adapter, check_name, find_adapter
from softprompt.generation.requests import StreamSettings, merge_settings
from softprompt.mini.scope import ROWS_JUDGED, foreign_note, is_mini
from softprompt.models.loading import word_embeddings
from softprompt.models.quantization import bits_when_loaded
from softprompt.utils.errors import ConfigError
from softprompt.utils.progress import say


class BaseWithAdapters:
    """A frozen base model with named adapters.

    Attributes:
        name: The base's name or path.
        adapters: The adapters by name.
        active_adapter: Name of the adapter of questions that name none.
    """

    def __init__(self, base: PreTrainedModel, adapter: LoadedAdapter):
        """Make `adapter` the adapter "default" of a base."""
        self.base, self.name = base, str(getattr(base, "name_or_path", ""))
        self.adapters, self.active_adapter = {"default": adapter}, "default"
        self._noted = False  # whether the note on the mini base has been given

    def __repr__(self) -> str:
        adapters = ", ".join(f"{name!r}: {_size(adapter)}" for name, adapter in self.adapters.items())
        device = word_embeddings(self.base).weight.device
        return (
            f"{type(self).__name__}(base={self.name!r}, device='{device}', adapters={{{adapters}}}, "
            f"active_adapter={self.active_adapter!r})"
        )

    def load_adapter(self, folder: str | Path, adapter_name: str | None = None) -> str:
        """Load an adapter folder, or "none" (the base without a prompt), under a name, by default the folder's path.
        Return the name.

        Raises:
            AdapterError: See `from_pretrained`.
        """
        name = str(folder) if adapter_name is None else adapter_name
        check_name(name, folder)
        self.add_adapter(name, LoadedAdapter() if str(folder) == NONE else LoadedAdapter.from_folder(folder))
        return name

    def set_adapter(self, adapter_name: str) -> None:
        """Make an adapter the active one, which answers questions that name no adapter.

        Raises:
            AdapterError: The adapter is not loaded.
        """
        find_adapter(self.adapters, adapter_name, "set_adapter")
        self.active_adapter = adapter_name

    @property
    def template(self) -> Template:
        """The prompt template of the active adapter."""
        return self.adapters[self.active_adapter].template

    @property
    def prompt(self) -> Tensor | None:
        """The learned prompt of the active adapter, [P, H] fp32; None for the base without a prompt."""
        return self.adapters[self.active_adapter].prompt

    @property
    def description(self) -> str:
        """One line that names the base and the adapters."""
        names = [name for name, adapter in self.adapters.items() if adapter.prompt is not None]
        return f"base {self.name}, adapter {', '.join(names)}" if names else f"base {self.name}, no prompt"

    def note_foreign_rows(self, rows: Sequence[Row]) -> None:
        """If the base is mini and most of the first `rows` are unlike its training data, print once what mini is made
        for."""
        if self._noted or not is_mini(self.name):
            return
        if note := foreign_note(map(texts_of, rows[:ROWS_JUDGED])):
            say(note)
            self._noted = True

    def settings(
        self, adapter: str | None = None, /, *, seed: int | None = None, batch_size: int = 8, **given: Any
    ) -> StreamSettings:
        """Return the settings that `stream` would use: each as given (unless None), else as saved with the adapter,
        else its default.

        Raises:
            ConfigError: A setting is unknown or invalid.
        """
        if faults := generation_faults({"seed": seed, "batch_size": batch_size}):
            raise ConfigError("; ".join(faults))
        saved = self.adapters.get(adapter or self.active_adapter, LoadedAdapter()).generation
        return StreamSettings(**vars(merge_settings(saved, given)), seed=seed, batch_size=batch_size)

    def add_adapter(self, name: str, adapter: LoadedAdapter) -> None:
        """Add an adapter that has been read already.

        Raises:
            AdapterError: Its hidden size differs from the base's.
        """
        H = word_embeddings(self.base).embedding_dim
        check_adapter(name, adapter, H, self.name, bits_when_loaded(self.base))
        self.adapters[name] = adapter


def _size(adapter: LoadedAdapter) -> str:
    return "no prompt" if adapter.prompt is None else f"{len(adapter.prompt)} virtual tokens"
