"""The files of a base, in its folder or in the hub's cache. Nothing is downloaded."""

import json
import os
from pathlib import Path
from typing import Any


def weight_files(name_or_path: str) -> list[Path]:
    """Return the files of a base's weights in its folder or in the hub's cache; an empty list if none are found."""
    folder = _folder_on_disk(name_or_path)
    return sorted(path for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern)) if folder else []


def _folder_on_disk(name_or_path: str) -> Path | None:
    """Return the folder of a base's files, which for a hub id is in the hub's cache; None if there is none."""
    from huggingface_hub import try_to_load_from_cache

    if os.path.isdir(name_or_path):
        return Path(name_or_path)
    try:
        config = try_to_load_from_cache(name_or_path, "config.json")
    except ValueError:  # the path of a folder that does not exist
        return None
    return Path(config).parent if isinstance(config, str) else None


def settings_on_disk(name_or_path: str) -> dict[str, Any]:
    """Return the content of a base's config.json; an empty dict if it cannot be read."""
    folder = _folder_on_disk(name_or_path)
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8")) if folder else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}
