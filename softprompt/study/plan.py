"""What a study is to run: its cells beside the rows, tokenizers and bases that they name, all checked beforehand."""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from softprompt.config.train_args import DEFAULT_NUM_VIRTUAL_TOKENS, DataArguments
from softprompt.data.build_data import Rows, make_template, read_rows, tokenize_rows
from softprompt.data.dataloader import total_steps
from softprompt.data.dataset import Row
from softprompt.data.tokenization import Example, Tokenized
from softprompt.engines.factory import trains_packed
from softprompt.models.capabilities import (
    RowMaxima,
    build_on_meta_device,
    check_init_text,
    check_rows_fit,
    check_supports_prompt,
    check_vocabulary,
)
from softprompt.models.loading import base_path, load_config, load_tokenizer, weight_files
from softprompt.models.precision import resolve_device
from softprompt.prompt.initial import initialiser
from softprompt.runs.crash_report import Failure, failure
from softprompt.study.grid import Cell, Study, refuse
from softprompt.utils.errors import ConfigError, ModelError, SoftpromptError
from softprompt.utils.fingerprints import fingerprint_of_rows, fingerprint_of_stored_base
from softprompt.utils.tokenizer_fingerprint import fingerprint_of_tokenizer

MOST_LETTERS, MOST_BYTES = 100, 150  # of a folder's name, before its hash; Chinese letters have three bytes each


@dataclass(frozen=True)
class Material:
    """What cells over the same base and rows share: the base's modules on the meta device and its tokenizer, examples
    to train on and held-out ones, the rows that the latter were made of and what is missing of their answers (as of
    `data.Tokenized`), how far all examples reach, and the fingerprints of all that is in files."""

    base: PreTrainedModel
    tokenizer: Any
    examples: list[Example]
    held_out: list[Example]
    held_out_rows: list[Row]
    held_out_missing: list[int]
    extent: RowMaxima
    fingerprints: dict[str, str]


NO_MATERIAL = Material(None, None, [], [], [], [], RowMaxima(0, 0), {})


@dataclass(frozen=True)
class Planned:
    """A cell with its material and its folder; `steps` are 0 where nothing is trained. An ensemble stands behind its
    `members`, whose folders these are. `failed` says why there is no material: a library failed
    over it, or it is unfit."""

    cell: Cell
    material: Material
    folder: Path
    steps: int
    members: tuple[Path, ...] = ()
    failed: Failure | None = None


def planned(study: Study) -> list[Planned]:
    """Read all rows, tokenise them, look at all bases' tokenizers and files, and check every cell against them. Of
    cells that come to the same (10 virtual tokens by default and by name, all rows and as many) the first is kept.

    A base or rows that are there and turn out to be unfit fail their own cells, and the others can go on.

    Raises:
        SoftpromptError: the study's file is wrong: a base or rows that are not there, a cell that cannot work, or no
            cell that can; nothing has been run or written.
    """
    shelf, cells = _Shelf(), study.output_dir / "cells"
    found: dict[str, Planned] = {}
    faults: dict[str, list[str]] = {}
    for cell in study.cells:
        material = shelf.material(cell)
        try:
            one = _planned(cell, material, cells)
        except ConfigError as error:
            faults.setdefault(str(error), []).append(str(cell))
        else:
            found.setdefault(_identity(cell, one.material), one)
    refuse(study.path, faults)
    if shelf.refused and all(one.failed for one in found.values()):
        raise shelf.refused[0]
    return list(found.values())


def _planned(cell: Cell, material: Material | Failure, cells: Path) -> Planned:
    """Raises ConfigError where the cell cannot work."""
    if isinstance(material, Failure):
        return Planned(cell, NO_MATERIAL, cells / _name(cell, NO_MATERIAL), 0, failed=material)
    _check(cell, material)
    steps = total_steps(cell.rows or len(material.examples), cell.config.training) if cell.trained else 0
    members = tuple(cells / _name(one, material) for one in cell.members())
    return Planned(cell, material, cells / _name(cell, material), steps, members)


class _Examples(NamedTuple):
    """What a tokenizer makes of a dataset: examples to train on, held-out ones with their rows, and the fingerprint of
    all rows."""

    data: Tokenized
    held_out: Tokenized | None
    held_out_rows: list[Row]
    fingerprint: str


class _Shelf:
    """Materials; each base's tokenizer is loaded once, each dataset read once, and tokenised once for a tokenizer.
    `refused` are this project's errors among those for which there is none."""

    def __init__(self) -> None:
        self.bases: dict[str, tuple[PreTrainedModel, Any, dict[str, str]]] = {}
        self.rows: dict[DataArguments, Rows] = {}
        self.tokenized: dict[tuple[DataArguments, str], _Examples] = {}
        self.failures: dict[tuple[str, DataArguments], Failure] = {}
        self.refused: list[SoftpromptError] = []

    def material(self, cell: Cell) -> Material | Failure:
        """Raises SoftpromptError where the cell names a base or rows that are not there, or in a wrong way."""
        key = str(cell.config.model.model_name_or_path), cell.config.data
        if key in self.failures:
            return self.failures[key]
        try:
            return self._material(cell)
        except SoftpromptError as error:
            if isinstance(error, ConfigError) or not _are_there(cell):
                raise
            self.refused.append(error)
            return self.failures.setdefault(key, failure(error))
        except Exception as error:
            return self.failures.setdefault(key, failure(error))

    def _material(self, cell: Cell) -> Material:
        config, name = cell.config, str(cell.config.model.model_name_or_path)
        if name not in self.bases:
            self.bases[name] = _base(name)
        base, tokenizer, prints = self.bases[name]
        template = make_template(config)
        if config.data not in self.rows:
            self.rows[config.data] = read_rows(config, template)
        rows = self.rows[config.data]
        key = (config.data, prints["tokenizer"])
        if key not in self.tokenized:
            data, of_held_out = tokenize_rows(config, template, tokenizer, rows)
            _tell(config.data.dataset, rows, data, of_held_out)
            of_rows = fingerprint_of_rows([*rows.train, *rows.held_out])
            kept = [rows.held_out[number] for number in of_held_out.kept] if of_held_out else []
            self.tokenized[key] = _Examples(data, of_held_out, kept, of_rows)
        data, of_held_out, kept, of_rows = self.tokenized[key]
        held_out = (of_held_out.examples, kept, of_held_out.missing) if of_held_out else ([], [], [])
        extent = RowMaxima.of(e.input_ids for e in (*data.examples, *held_out[0]))
        return Material(base, tokenizer, data.examples, *held_out, extent, {**prints, "dataset": of_rows})


def _tell(dataset: str | None, rows: Rows, data: Tokenized, held_out: Tokenized | None) -> None:
    """What was found in the rows, as a run says it."""
    for line in (*rows.notes, f"{dataset}, training: {data}", *([f"held out: {held_out}"] if held_out else [])):
        print(line)


def _are_there(cell: Cell) -> bool:
    """Whether the base and the rows that a cell names are on this machine."""
    data = cell.config.data
    rows = [name for name in (data.dataset, data.eval_dataset) if name and not name.startswith("mini:")]
    return all(map(os.path.exists, [base_path(str(cell.config.model.model_name_or_path)), *rows]))


def _base(name: str) -> tuple[PreTrainedModel, Any, dict[str, str]]:
    """A base without its values, its tokenizer, and the fingerprints of the tokenizer and of the base's files."""
    path = base_path(name)
    config = load_config(path)
    tokenizer = load_tokenizer(path)
    files = weight_files(path)
    if not files and Path(path).is_dir():
        raise ModelError(f"{name}: holds no weights (*.safetensors, *.bin); name a whole base")
    prints = {"tokenizer": fingerprint_of_tokenizer(tokenizer), "base": fingerprint_of_stored_base(config, files)}
    base = build_on_meta_device(config, name)
    check_supports_prompt(base, name)
    check_vocabulary(tokenizer, base, name)
    return base, tokenizer, prints


def _check(cell: Cell, material: Material) -> None:
    """Raises ConfigError where a cell cannot work."""
    trains_packed(cell.config, material.base.config, resolve_device(cell.config.model.device))
    if not material.held_out:
        raise ConfigError("no held-out rows to compare by; give eval_dataset or eval_rows")
    initialiser(cell.config, material.tokenizer, len(material.tokenizer))
    check_init_text(cell.config.prompt.prompt_tuning_init_text, material.tokenizer, material.base)
    check_rows_fit(material.base, virtual_tokens(cell, material), cell.config.data.max_length, material.extent)
    if cell.rows and cell.rows > len(material.examples):
        there = f"{len(material.examples):,} rows of {cell.config.data.dataset}"
        raise ConfigError(f"rows {cell.rows:,} is more than the {there} that can be trained on")


def virtual_tokens(cell: Cell, material: Material) -> int:
    """How many a cell's prompt has: as many as are given, else those of its text, else the default."""
    prompt = cell.config.prompt
    if prompt.num_virtual_tokens:
        return prompt.num_virtual_tokens
    if prompt.prompt_tuning_init == "TEXT" and material.tokenizer:
        return len(material.tokenizer(prompt.prompt_tuning_init_text)["input_ids"])
    return DEFAULT_NUM_VIRTUAL_TOKENS


def _identity(cell: Cell, material: Material) -> str:
    """What its settings come to with its rows and its tokenizer."""
    rows = None if cell.rows == len(material.examples) else cell.rows
    return repr({**cell.settings(), "num_virtual_tokens": virtual_tokens(cell, material), "rows": rows})


def _name(cell: Cell, material: Material) -> str:
    """Readable, and another for every other setting or content."""
    content = json.dumps([cell.settings(), material.fingerprints], sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()[:12]
    readable = re.sub(r"[^\w.-]+", "-", str(cell)).strip(".-")[:MOST_LETTERS]
    readable = readable.encode()[:MOST_BYTES].decode(errors="ignore")
    return f"{readable}-{digest}"
