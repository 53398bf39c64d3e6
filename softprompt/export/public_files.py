"""The files of a run as they are published: without paths of this machine."""

import json
import os
import re
from pathlib import Path
from typing import Any

from markupsafe import escape

from softprompt.prompt.file_names import CARD_FILE, CONFIG_FILE, SETTINGS_FILE, WEIGHTS_FILE
from softprompt.prompt.model_card import last_component
from softprompt.prompt.public_names import MINI, PATH_SETTINGS, hub_id_of_base, hub_ids, is_local
from softprompt.runs.file_names import REPORT_FILE
from softprompt.runs.manifest import Manifest
from softprompt.runs.run_card import run_card
from softprompt.runs.run_reader import RunRecord, read_run

PROGRAM = Path(__file__).parents[2]  # holds train.py and infer.py in a clone
UPLOADED_FILES = (CONFIG_FILE, WEIGHTS_FILE, SETTINGS_FILE, CARD_FILE, REPORT_FILE)


def public_files(folder: Path, repository: str) -> dict[str, bytes]:
    """Return the content of those UPLOADED_FILES that a run has written, by name.

    The card's code names the repository. A base that was a local folder is not named in adapter_config.json, because
    its path would mean another folder, or none, on another machine. In the report, a path is shortened to its last
    component.

    Raises:
        ReportError, AdapterError: The folder holds no finished run.
        OSError: A file cannot be read.
    """
    record = read_run(folder)
    names = Manifest(folder).names().intersection(UPLOADED_FILES)
    files = {name: (folder / name).read_bytes() for name in sorted(names)}
    if CONFIG_FILE in files:
        files[CONFIG_FILE] = _without_local_base(files[CONFIG_FILE], record)
    if CARD_FILE in files:
        files[CARD_FILE] = run_card(record, repository)
    if REPORT_FILE in files:
        files[REPORT_FILE] = without_paths(files[REPORT_FILE].decode(), _paths(record)).encode()
    return files


def _without_local_base(config: bytes, record: RunRecord) -> bytes:
    """Return an adapter_config.json that does not name a local base; PEFT then loads the adapter onto any base that it
    is given."""
    values = json.loads(config)
    base = values.get("base_model_name_or_path")
    known = record.facts.get("hub") or {"model_name_or_path": hub_id_of_base(base)}
    if base == MINI or known.get("model_name_or_path"):
        return config
    values |= {"base_model_name_or_path": None, "tokenizer_name_or_path": None}
    return json.dumps(values, indent=2, sort_keys=True).encode()


def _paths(record: RunRecord) -> list[str]:
    """Return the paths that the files of a run may contain."""
    settings = record.arguments
    on_hub = set((record.facts.get("hub") or hub_ids(settings)).values())
    given = {str(settings[name]) for name in PATH_SETTINGS if settings.get(name)} - on_hub
    return [str(record.folder), *(path for path in given if is_local(path) or os.sep in path)]


def without_paths(text: str, paths: list[str]) -> str:
    """Return an HTML text in which each of `paths`, also as an absolute path, is shortened to its last component, and
    in which the folders of the user, of this process and of its program are not named."""
    shorter: dict[str, str] = {}
    for path in paths:
        name = last_component(os.path.abspath(os.path.expanduser(path)))
        spelled = {path, os.path.abspath(os.path.expanduser(path)), os.path.realpath(os.path.expanduser(path))}
        shorter |= {each: name for each in spelled if os.sep in each}
    shorter |= {str(PROGRAM): ".", str(Path.cwd()): ".", str(Path.home()): "~"}
    known: dict[str, Any] = {str(escape(path)): str(escape(name)) for path, name in shorter.items() if len(path) > 1}
    longest_first = sorted(known, key=len, reverse=True)
    whole = rf"(?:{'|'.join(map(re.escape, longest_first))})(?!\w)"
    return re.sub(whole, lambda found: known[found[0]], text)
