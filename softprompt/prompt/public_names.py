"""Names of bases and datasets as they may be published: without paths of this machine."""

import os
import re
from collections.abc import Mapping
from typing import Any

from softprompt.config.data_args import is_mini_task
from softprompt.data.readers import READERS

PATH_SETTINGS = (
    *("model_name_or_path", "dataset", "eval_dataset", "init_adapter", "output_dir", "offload_folder"),
    *("distill_prompt", "distill_context"),
)
MINI = "mini"


def is_local(value: Any) -> bool:
    """Return whether a setting is a path of this machine rather than a hub id or a name of this package."""
    if not isinstance(value, str) or not value or value == MINI or is_mini_task(value):
        return False
    return os.path.exists(value) or os.path.isabs(value) or value[0] in "~."


def public_name(value: Any) -> Any:
    """Return the last component of a local path; return hub ids and anything else unchanged."""
    if not is_local(value):
        return value
    return os.path.basename(os.path.abspath(os.path.expanduser(value)))


def hub_id_of_base(base: str | None) -> str | None:
    """Return the hub id of a base; None for a local folder and for the base of this package. Old models have an id
    without an owner, such as gpt2."""
    is_id = base and re.fullmatch(r"([\w.-]+/)?[\w.-]+", base)
    return base if is_id and base != MINI and not is_local(base) else None


def hub_id_of_dataset(dataset: str | None) -> str | None:
    """Return the hub id of a dataset; None for local rows and for a task of the mini base."""
    is_file = os.path.splitext(dataset or "")[1].lower() in READERS
    return None if not dataset or is_mini_task(dataset) or is_file else hub_id_of_base(dataset)


def hub_ids(settings: Mapping[str, Any]) -> dict[str, str | None]:
    """Return which base and which rows of a run are on the hub, by the name of the setting. It must be called where the
    run's relative paths are valid."""
    return {
        "model_name_or_path": hub_id_of_base(settings.get("model_name_or_path")),
        "dataset": hub_id_of_dataset(settings.get("dataset")),
        "eval_dataset": hub_id_of_dataset(settings.get("eval_dataset")),
    }
