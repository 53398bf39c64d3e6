"""From settings to rows, to examples, to what the loop is fed with."""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from softprompt.config import TrainConfig
from softprompt.data import Encoded, Tokenized, encode, tokenize
from softprompt.errors import ConfigError, DataError
from softprompt.feed import Feed, Listed
from softprompt.fingerprints import fingerprint_of_rows
from softprompt.mini import rows as mini_rows
from softprompt.row_stream import RowStream
from softprompt.rows import Row, checked, checked_row, checked_rows, load_rows
from softprompt.sources import Behind, Raw, Source, head, open_source, placed
from softprompt.template import CHAT, Template
from softprompt.token_cache import cached
from softprompt.torchrun import is_main

HEAD = 1000  # rows at the beginning of a stream that are looked at before the run


def template_of(config: TrainConfig) -> Template:
    return Template(config.data.template or "default")


class Rows(NamedTuple):
    """Training rows, held-out ones, and with --streaming what all training rows are read from; then `train` is the
    first of them."""

    train: list[Row]
    held_out: list[Row]
    source: Source | None = None

    @property
    def fingerprints(self) -> dict[str, str]:
        of_training = self.source.fingerprint if self.source else fingerprint_of_rows(self.train)
        return {"dataset": of_training, "held-out rows": fingerprint_of_rows(self.held_out)}


def read_rows(config: TrainConfig, template: Template) -> Rows:
    """Held-out rows are from --eval_dataset, from the dataset's end (a stream's beginning), or a mini task's own.

    Raises:
        DataError: a dataset that cannot be read, holds no rows, or none beside --eval_rows; a row without what the
            template needs (of a stream, among the first).
        ConfigError: a stream of a length that nobody knows, without --max_steps.
    """
    data, dataset = config.data, str(config.data.dataset)
    if data.streaming:
        return _open(config, template, dataset)
    rows = _load(config, template, dataset, "train")
    if data.eval_rows:
        if data.eval_rows >= len(rows):
            raise DataError(
                f"--eval_rows {data.eval_rows} leaves none of the {len(rows):,} rows of {dataset} to train on"
            )
        return Rows(rows[: -data.eval_rows], rows[-data.eval_rows :])
    held_out = data.eval_dataset or (dataset if _is_mini(dataset) else None)
    return Rows(rows, _load(config, template, held_out, "eval") if held_out else [])


def _open(config: TrainConfig, template: Template, dataset: str) -> Rows:
    data = config.data
    source = open_source(dataset, data.dataset_config_name, data.dataset_split, keep=not config.training.dry_run)
    if source.rows is None and config.training.max_steps <= 0:
        raise ConfigError(f"--max_steps is missing: how many rows {dataset} has is not known before they are all read")
    held = data.eval_rows
    first = checked_rows(dataset, map(placed, head(source, held + HEAD)), template, config.columns)
    if not first:
        raise DataError(f"{dataset} holds no rows; expected at least one with instruction and output")
    if held >= len(first):
        raise DataError(f"--eval_rows {held} leaves none of the {len(first):,} rows of {dataset} to train on")
    held_out = _load(config, template, data.eval_dataset, "eval") if data.eval_dataset else first[:held]
    return Rows(first[held:], held_out, Behind(source, held))


def make_feed(config: TrainConfig, rows: Rows, data: Tokenized, tokenizer: Any, rows_per_step: int) -> Feed:
    """Of all examples, or of a stream's rows, which become examples in time; those then raise DataError."""
    if rows.source is None:
        return Listed(data.examples, config.training, rows_per_step)
    template, cut = template_of(config), (config.data.max_length, config.data.truncation_side)

    def encoded(raws: Sequence[Raw]) -> list[Encoded]:
        checked = [checked_row(*placed(raw), template, config.columns) for raw in raws]
        return encode(checked, [place for place, _ in raws], tokenizer, template, *cut)

    name = str(config.data.dataset)
    return RowStream(rows.source, encoded, config.training, rows_per_step, config.data.buffer_size, name)


def tokenize_rows(
    config: TrainConfig, template: Template, tokenizer: Any, rows: Rows
) -> tuple[Tokenized, Tokenized | None]:
    """Examples of training and held-out rows (of a stream, of its first rows); a bar shows on a terminal.

    Raises:
        DataError: as of `data.tokenize`.
    """
    progress = sys.stderr.isatty() and is_main()
    cut = (config.data.max_length, config.data.truncation_side)

    def examples(rows: list[Row]) -> Tokenized:
        def make() -> Tokenized:
            return tokenize(rows, tokenizer, template, *cut, progress)

        if template.spec == CHAT:  # may depend on whatever the template looks at, the date for one
            return make()
        read, write = not config.data.overwrite_cache, not config.training.dry_run
        return cached(make, rows, tokenizer, template.spec, *cut, read=read, write=write)

    return examples(rows.train), examples(rows.held_out) if rows.held_out else None


def _is_mini(dataset: str) -> bool:
    return dataset.startswith("mini:")


def _load(config: TrainConfig, template: Template, dataset: str, mini_split: str) -> list[Row]:
    if _is_mini(dataset):
        made = mini_rows(dataset.removeprefix("mini:"), mini_split)
        return [checked(f"{dataset}, row {number}", row, template) for number, row in enumerate(made, start=1)]
    data = config.data
    return load_rows(dataset, template, config.columns, config_name=data.dataset_config_name, split=data.dataset_split)
