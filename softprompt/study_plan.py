"""What a study is to run: its cells beside the rows, tokenizers and bases that they name, all checked beforehand."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from softprompt.arguments import DEFAULT_NUM_VIRTUAL_TOKENS, DataArguments
from softprompt.build import base_path, initialiser
from softprompt.data import Example, Tokenized
from softprompt.engines import trains_packed
from softprompt.errors import ConfigError, ModelError
from softprompt.feed import total_steps
from softprompt.fingerprints import fingerprint_of_files, fingerprint_of_rows, fingerprint_of_tokenizer
from softprompt.grid import Cell, Study, refuse
from softprompt.intake import Rows, read_rows, template_of, tokenize_rows
from softprompt.model import from_hub_or_folder, load_tokenizer, resolve_device, weight_files
from softprompt.rows import Row

MOST_LETTERS = 100  # of a folder's name, before its hash


@dataclass(frozen=True)
class Material:
    """What cells over the same base and rows share: the base's configuration and tokenizer, examples to train on and
    held-out ones, the rows that the latter were made of and what is missing of their answers (as of `data.Tokenized`),
    and the fingerprints of all that is in files."""

    base_config: Any
    tokenizer: Any
    examples: list[Example]
    held_out: list[Example]
    held_out_rows: list[Row]
    held_out_missing: list[int]
    fingerprints: dict[str, str]


@dataclass(frozen=True)
class Planned:
    """A cell with its material and its folder; `steps` are 0 where nothing is trained. An ensemble stands behind its
    `members`, whose folders these are."""

    cell: Cell
    material: Material
    folder: Path
    steps: int
    members: tuple[Path, ...] = ()


def planned(study: Study) -> list[Planned]:
    """Read all rows, tokenise them, look at all bases' tokenizers and files, and check every cell against them. Of
    cells that come to the same (10 virtual tokens by default and by name, all rows and as many) the first is kept.

    Raises:
        SoftpromptError: a base or rows that cannot be read, a cell that cannot work; nothing has been run or written.
    """
    shelf, cells = _Shelf(), study.output_dir / "cells"
    found: dict[str, Planned] = {}
    faults: dict[str, list[str]] = {}
    for cell in study.cells:
        material = shelf.material(cell)
        try:
            _check(cell, material)
        except ConfigError as error:
            faults.setdefault(str(error), []).append(str(cell))
        steps = total_steps(cell.rows or len(material.examples), cell.config.training) if cell.trained else 0
        members = tuple(cells / _name(one, material) for one in cell.members())
        one = Planned(cell, material, cells / _name(cell, material), steps, members)
        found.setdefault(_identity(cell, material), one)
    refuse(study.path, faults)
    return list(found.values())


class _Examples(NamedTuple):
    """What a tokenizer makes of a dataset: examples to train on, held-out ones with their rows, and the fingerprint of
    all rows."""

    data: Tokenized
    held_out: Tokenized | None
    held_out_rows: list[Row]
    fingerprint: str


class _Shelf:
    """Materials; each base's tokenizer is loaded once, each dataset read once, and tokenised once for a tokenizer."""

    def __init__(self) -> None:
        self.bases: dict[str, tuple[Any, Any, dict[str, str]]] = {}
        self.rows: dict[DataArguments, Rows] = {}
        self.tokenized: dict[tuple[DataArguments, str], _Examples] = {}

    def material(self, cell: Cell) -> Material:
        config, name = cell.config, str(cell.config.model.model_name_or_path)
        if name not in self.bases:
            self.bases[name] = _base(name)
        base_config, tokenizer, prints = self.bases[name]
        template = template_of(config)
        if config.data not in self.rows:
            self.rows[config.data] = read_rows(config, template)
        rows = self.rows[config.data]
        key = (config.data, prints["tokenizer"])
        if key not in self.tokenized:
            data, of_held_out = tokenize_rows(config, template, tokenizer, rows)
            of_rows = fingerprint_of_rows([*rows.train, *rows.held_out])
            kept = [rows.held_out[number] for number in of_held_out.kept] if of_held_out else []
            self.tokenized[key] = _Examples(data, of_held_out, kept, of_rows)
        data, of_held_out, kept, of_rows = self.tokenized[key]
        held_out = (of_held_out.examples, kept, of_held_out.missing) if of_held_out else ([], [], [])
        return Material(base_config, tokenizer, data.examples, *held_out, {**prints, "dataset": of_rows})


def _base(name: str) -> tuple[Any, Any, dict[str, str]]:
    """A base's configuration and tokenizer, and the fingerprints of the tokenizer and of the base's files."""
    from transformers import AutoConfig

    path = base_path(name)
    tokenizer = load_tokenizer(path)
    files = weight_files(path)
    if not files and Path(path).is_dir():
        raise ModelError(f"{name}: holds no weights (*.safetensors, *.bin); name a whole base")
    prints = {"tokenizer": fingerprint_of_tokenizer(tokenizer), "base": fingerprint_of_files(files)}
    return from_hub_or_folder(AutoConfig, path, "base model"), tokenizer, prints


def _check(cell: Cell, material: Material) -> None:
    """Raises ConfigError where a cell cannot work."""
    trains_packed(cell.config, material.base_config, resolve_device(cell.config.model.device))
    if not material.held_out:
        raise ConfigError("no held-out rows to compare by; give eval_dataset or eval_rows")
    initialiser(cell.config, material.tokenizer, len(material.tokenizer))
    if cell.rows and cell.rows > len(material.examples):
        there = f"{len(material.examples):,} rows of {cell.config.data.dataset}"
        raise ConfigError(f"rows {cell.rows:,} is more than the {there} that can be trained on")


def _identity(cell: Cell, material: Material) -> str:
    """What its settings come to with its rows and its tokenizer."""
    prompt, rows = cell.config.prompt, cell.rows
    length = prompt.num_virtual_tokens or DEFAULT_NUM_VIRTUAL_TOKENS
    if prompt.prompt_tuning_init == "TEXT" and not prompt.num_virtual_tokens:
        length = len(material.tokenizer(prompt.prompt_tuning_init_text)["input_ids"])
    resolved = {"num_virtual_tokens": length, "rows": None if rows == len(material.examples) else rows}
    return repr({**cell.settings(), **resolved})


def _name(cell: Cell, material: Material) -> str:
    """Readable, and another for every other setting or content."""
    content = json.dumps([cell.settings(), material.fingerprints], sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()[:12]
    readable = re.sub(r"[^\w.-]+", "-", str(cell)).strip(".-")[:MOST_LETTERS]
    return f"{readable}-{digest}"
