"""Plan a study: read the rows, tokenizers and base configurations that its cells name, and check every cell before any
of them runs."""

import os
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from softprompt.config.data_args import DataArguments
from softprompt.config.train_args import DEFAULT_NUM_VIRTUAL_TOKENS
from softprompt.data.build_data import Rows, make_template, read_rows, tokenize_rows
from softprompt.data.dataloader import total_steps
from softprompt.data.dataset import Row
from softprompt.data.tokenization import Examples, Tokenized
from softprompt.models.base_files import weight_files
from softprompt.models.capabilities import (
    RowMaxima,
    build_on_meta_device,
    check_init_text,
    check_rows_fit,
    check_supports_prompt,
    check_vocabulary,
)
from softprompt.models.loading import base_path, load_config, load_tokenizer
from softprompt.models.precision import resolve_device
from softprompt.prompt.initial import initializer
from softprompt.runs.crash_report import Failure, failure
from softprompt.study.cell import Cell, folder_name
from softprompt.study.grid import Study, raise_cell_errors
from softprompt.training.prompt_setup import encoder_width
from softprompt.utils.errors import ConfigError, ModelError, SoftpromptError
from softprompt.utils.fingerprints import fingerprint_of_rows, fingerprint_of_stored_base
from softprompt.utils.tokenizer_fingerprint import fingerprint_of_tokenizer


@dataclass(frozen=True)
class CellInputs:
    """The inputs that all cells with the same base and dataset share.

    Args:
        base: The base on the meta device: its modules without weights.
        tokenizer: The base's tokenizer.
        train: Training rows.
        held_out: Held-out rows; empty if there are none.
        held_out_rows: The row of each held-out example.
        extent: The largest length and token id of all examples.
        fingerprints: Fingerprints of the base, the tokenizer and the rows.
    """

    base: PreTrainedModel
    tokenizer: Any
    train: Tokenized
    held_out: Tokenized
    held_out_rows: list[Row]
    extent: RowMaxima
    fingerprints: dict[str, str]


NO_ROWS = Tokenized(Examples.from_rows([]), [], [], 0, 0, 0, 0)
NO_INPUTS = CellInputs(None, None, NO_ROWS, NO_ROWS, [], RowMaxima(0, 0), {})


@dataclass(frozen=True)
class PlannedCell:
    """A cell that has been checked.

    Args:
        cell: The cell.
        inputs: Its base, tokenizer and examples.
        folder: Folder of its result.
        steps: Number of optimizer steps; 0 if nothing is trained.
        members: Folders of an ensemble's members. An ensemble comes after them in the plan.
        failed: Why there are no inputs, if reading them failed; the cell is then not run.
    """

    cell: Cell
    inputs: CellInputs
    folder: Path
    steps: int
    members: tuple[Path, ...] = ()
    failed: Failure | None = None

    def description(self) -> dict[str, Any]:
        """Return the part of the cell's record that is known before it runs."""
        return {
            "settings": self.cell.settings(),
            "rows": self.cell.rows or len(self.inputs.train.examples),
            "steps": self.steps,
            "held_out_targets": self.inputs.held_out.examples.targets,
        }


def plan_study(study: Study) -> list[PlannedCell]:
    """Read and tokenize all rows, read the configuration and tokenizer of each base, and check every cell.

    Cells that describe the same run are planned once, such as one with the default of 10 virtual tokens and one that
    sets 10, or one with an encoder of the default width and one that sets this width. If a base or a dataset exists but
    cannot be used, its cells are planned as failed, and the others can run.

    Raises:
        SoftpromptError: A base or dataset does not exist, a cell has settings that cannot work, or no cell can run.
            Nothing has been run or written.
    """
    cache, cells_folder = _InputCache(), study.output_dir / "cells"
    plan: dict[str, PlannedCell] = {}
    errors: dict[str, list[str]] = {}
    for cell in study.cells:
        try:
            inputs = cache.inputs(cell)
        except SoftpromptError as error:
            raise type(error)(f"{study.path}: the cell {cell}: {error}") from None
        try:
            planned = _planned_cell(cell, inputs, cells_folder)
        except ConfigError as error:
            errors.setdefault(str(error), []).append(str(cell))
        else:
            plan.setdefault(_identity(cell, planned.inputs), planned)
    raise_cell_errors(study.path, errors)
    if cache.refused and all(planned.failed for planned in plan.values()):
        raise type(cache.refused[0])(f"{study.path}: no cell can run: {cache.refused[0]}")
    return list(plan.values())


def virtual_tokens(cell: Cell, inputs: CellInputs) -> int:
    """Return the number of a cell's virtual tokens: the given one, else the length of its initial text in tokens, else
    the default."""
    prompt = cell.config.prompt
    if prompt.num_virtual_tokens:
        return prompt.num_virtual_tokens
    if prompt.prompt_tuning_init == "TEXT" and inputs.tokenizer:
        return len(inputs.tokenizer(prompt.prompt_tuning_init_text)["input_ids"])
    return DEFAULT_NUM_VIRTUAL_TOKENS


def _planned_cell(cell: Cell, inputs: CellInputs | Failure, cells_folder: Path) -> PlannedCell:
    """Check a cell. Raises ConfigError if its settings cannot work."""
    if isinstance(inputs, Failure):
        return PlannedCell(cell, NO_INPUTS, cells_folder / folder_name(cell, {}), 0, failed=inputs)
    _check(cell, inputs)
    steps = total_steps(cell.rows or len(inputs.train.examples), cell.config.training) if cell.trained else 0
    members = tuple(cells_folder / folder_name(member, inputs.fingerprints) for member in cell.members())
    return PlannedCell(cell, inputs, cells_folder / folder_name(cell, inputs.fingerprints), steps, members)


class _InputCache:
    """Loads each tokenizer once, reads each dataset once, and tokenizes it once for each different tokenizer.

    `refused` holds the SoftpromptErrors among the errors that left cells without inputs.
    """

    def __init__(self) -> None:
        self.bases: dict[str, tuple[PreTrainedModel, Any, dict[str, str]]] = {}
        self.rows: dict[DataArguments, Rows] = {}
        # For each dataset and tokenizer: training rows, held-out rows, these as texts, and the fingerprint of all rows.
        self.tokenized: dict[tuple[DataArguments, str], tuple[Tokenized, Tokenized, list[Row], str]] = {}
        self.failures: dict[tuple[str, DataArguments], Failure] = {}
        self.refused: list[SoftpromptError] = []

    def inputs(self, cell: Cell) -> CellInputs | Failure:
        """Return the inputs of a cell, or why its base or its rows cannot be used.

        Raises:
            SoftpromptError: The base or the dataset does not exist, or the settings that name it are wrong.
        """
        key = str(cell.config.model.model_name_or_path), cell.config.data
        if key in self.failures:
            return self.failures[key]
        try:
            return self._load(cell)
        except SoftpromptError as error:
            if isinstance(error, ConfigError) or not _inputs_exist(cell):
                raise
            self.refused.append(error)
            return self.failures.setdefault(key, failure(error))
        except Exception as error:
            return self.failures.setdefault(key, failure(error))

    def _load(self, cell: Cell) -> CellInputs:
        config, name = cell.config, str(cell.config.model.model_name_or_path)
        if name not in self.bases:
            self.bases[name] = _read_base(name)
        base, tokenizer, fingerprints = self.bases[name]
        key = (config.data, fingerprints["tokenizer"])
        if key not in self.tokenized:
            self.tokenized[key] = self._tokenize(cell, tokenizer)
        train, held_out, held_out_rows, of_rows = self.tokenized[key]
        extent = RowMaxima.of(*(some.examples for some in (train, held_out) if some.examples))
        known = {**fingerprints, "dataset": of_rows}
        return CellInputs(base, tokenizer, train, held_out, held_out_rows, extent, known)

    def _tokenize(self, cell: Cell, tokenizer: Any) -> tuple[Tokenized, Tokenized, list[Row], str]:
        config, template = cell.config, make_template(cell.config)
        if config.data not in self.rows:
            self.rows[config.data] = read_rows(config, template)
        rows = self.rows[config.data]
        train, held_out = tokenize_rows(config, template, tokenizer, rows)
        described = [f"{config.data.dataset}, training: {train}", *([f"held out: {held_out}"] if held_out else [])]
        print("\n".join([*rows.notices, *described]))
        held_out = held_out or NO_ROWS
        kept = [rows.held_out[number] for number in held_out.kept]
        return train, held_out, kept, fingerprint_of_rows(chain(rows.train, rows.held_out))


def _inputs_exist(cell: Cell) -> bool:
    """Return whether the base and the rows that a cell names are on this machine."""
    data = cell.config.data
    rows = [name for name in (data.dataset, data.eval_dataset) if name and not name.startswith("mini:")]
    return all(map(os.path.exists, [base_path(str(cell.config.model.model_name_or_path)), *rows]))


def _read_base(name: str) -> tuple[PreTrainedModel, Any, dict[str, str]]:
    """Return a base on the meta device, its tokenizer, and the fingerprints of the tokenizer and the base's files."""
    path = base_path(name)
    config = load_config(path)
    tokenizer = load_tokenizer(path)
    files = weight_files(path)
    if not files and Path(path).is_dir():
        raise ModelError(f"{name}: holds no weights (*.safetensors, *.bin); name a folder with all files of the base")
    fingerprints = {
        "tokenizer": fingerprint_of_tokenizer(tokenizer),
        "base": fingerprint_of_stored_base(config, files),
    }
    base = build_on_meta_device(config, name)
    check_supports_prompt(base, name)
    check_vocabulary(tokenizer, base, name)
    return base, tokenizer, fingerprints


def _check(cell: Cell, inputs: CellInputs) -> None:
    """Raise ConfigError if a cell's settings cannot work with its base and rows."""
    resolve_device(cell.config.model.device)
    if not inputs.held_out.examples:
        raise ConfigError("there are no held-out rows to compare on; give eval_dataset or eval_rows")
    initializer(cell.config, inputs.tokenizer, len(inputs.tokenizer))
    check_init_text(cell.config.prompt.prompt_tuning_init_text, inputs.tokenizer, inputs.base)
    check_rows_fit(inputs.base, virtual_tokens(cell, inputs), cell.config.data.max_length, inputs.extent)
    if cell.rows and cell.rows > len(inputs.train.examples):
        available = f"{len(inputs.train.examples):,} rows of {cell.config.data.dataset}"
        raise ConfigError(f"rows {cell.rows:,} is more than the {available} that can be trained on")


def _identity(cell: Cell, inputs: CellInputs) -> str:
    """Return a key that is equal for cells that describe the same run."""
    settings = {**cell.settings(), "num_virtual_tokens": virtual_tokens(cell, inputs)}
    settings["rows"] = None if cell.rows == len(inputs.train.examples) else cell.rows
    if cell.config.prompt.prompt_reparameterization != "none" and inputs.base:
        settings["encoder_hidden_size"] = encoder_width(cell.config.prompt, inputs.base)
    return repr(sorted(settings.items()))
