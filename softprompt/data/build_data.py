"""From settings to rows, to examples, to what the loop is fed with."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from softprompt.config.loader import TrainConfig
from softprompt.config.validation import is_mini_task
from softprompt.data.dataloader import ListLoader, WindowLoader
from softprompt.data.dataset import check_fields, check_row, check_rows, rows_of
from softprompt.data.readers import path_of
from softprompt.data.row_store import RowStore
from softprompt.data.splits import Extent, splits_of
from softprompt.data.stream_loader import StreamLoader
from softprompt.data.stream_sources import Behind, Raw, Source, head, open_source, placed
from softprompt.data.template import CHAT, Template
from softprompt.data.token_cache import cached
from softprompt.data.tokenization import Encoded, Tokenized, encode, tokenize
from softprompt.mini import rows as mini_rows
from softprompt.utils.errors import ConfigError, DataError
from softprompt.utils.torchrun_env import is_main

HEAD = 1000  # rows at the beginning of a stream that are looked at before the run


def make_template(config: TrainConfig) -> Template:
    return Template(config.data.template or "default")


class Rows(NamedTuple):
    """Training rows, held-out ones, and with --streaming what all training rows are read from; then `train` is the
    first of them. `notes` say what a user should know of which rows these are."""

    train: RowStore
    held_out: RowStore
    source: Source | None = None
    notes: Sequence[str] = ()

    @property
    def fingerprints(self) -> dict[str, str]:
        of_training = self.source.fingerprint if self.source else self.train.fingerprint
        return {"dataset": of_training, "held-out rows": self.held_out.fingerprint}


class _Part(NamedTuple):
    """Rows of a dataset, which they are (None: made in memory), and what is to be said of them."""

    rows: RowStore
    extent: Extent | None = None
    notes: Sequence[str] = ()


def read_rows(config: TrainConfig, template: Template) -> Rows:
    """Held-out rows are from --eval_dataset or --eval_split, from the dataset's end (a stream's beginning), or a mini
    task's own.

    Raises:
        DataError: a dataset that cannot be read, has no such split, holds no rows, or none beside --eval_rows; a row
            without what the template needs (of a stream, among the first); held-out rows that are the training rows.
        ConfigError: a stream of a length that nobody knows, without --max_steps; a configuration of what has none.
    """
    data, dataset = config.data, str(config.data.dataset)
    _check_config_name(config)
    if data.streaming:
        return _open(config, template, dataset)
    rows, extent, notes = _training(config, template, dataset)
    if data.eval_rows:
        if data.eval_rows >= len(rows):
            raise DataError(
                f"--eval_rows {data.eval_rows} leaves none of the {len(rows):,} rows of {dataset} to train on"
            )
        held_out = _Part(rows.split_off(data.eval_rows))
    else:
        held_out = _held_out(config, template, extent)
    doubled = [] if is_mini_task(dataset) else _describe_duplicates(rows, held_out.rows)
    return Rows(rows, held_out.rows, notes=[*notes, *held_out.notes, *doubled])


def _open(config: TrainConfig, template: Template, dataset: str) -> Rows:
    data = config.data
    source = open_source(dataset, data.dataset_config_name, data.dataset_split, keep=not config.training.dry_run)
    if source.rows is None and config.training.max_steps <= 0:
        raise ConfigError(f"--max_steps is missing: how many rows {dataset} has is not known before they are all read")
    held = data.eval_rows
    first = check_rows(dataset, map(placed, head(source, held + HEAD)), template, config.columns)
    if not first:
        raise DataError(f"{dataset} holds no rows; expected at least one with instruction and output")
    if held >= len(first):
        raise DataError(f"--eval_rows {held} leaves none of the {len(first):,} rows of {dataset} to train on")
    held_out = _Part(first[:held]) if held else _held_out(config, template, source.extent)
    notes = [*source.notes, *held_out.notes, *_describe_duplicates(first[held:], held_out.rows, "the first ")]
    return Rows(first[held:], held_out.rows, Behind(source, held), notes)


def _training(config: TrainConfig, template: Template, dataset: str) -> _Part:
    if is_mini_task(dataset):
        return _Part(_made_rows(dataset, "train", template))
    data = config.data
    splits = splits_of(dataset, data.dataset_config_name)
    taken = splits.take(data.dataset_split, "--dataset_split")
    rows = rows_of(dataset, taken.rows, template, config.columns)
    return _Part(rows, taken.extent, [*splits.notes, *splits.told("training", taken.split)])


def _held_out(config: TrainConfig, template: Template, training: Extent | None) -> _Part:
    """Rows of --eval_dataset; of a hub's, no other split is downloaded with --streaming."""
    data, dataset = config.data, config.data.held_out
    if dataset is None:
        return _Part(RowStore())
    if is_mini_task(dataset):
        return _Part(_made_rows(dataset, "eval", template))
    flag, name = "--eval_split", data.dataset_config_name
    if data.streaming and path_of(dataset) is None:
        source = open_source(dataset, name, data.eval_split, flag=flag)
        _refuse_training_rows(dataset, source.extent, training)
        return _Part(check_rows(dataset, map(placed, source.read()), template, config.columns), source.extent)
    splits = splits_of(dataset, name)
    taken = splits.take(data.eval_split, flag)
    _refuse_training_rows(dataset, taken.extent, training)
    notes = [] if dataset == data.dataset else splits.notes
    rows = rows_of(dataset, taken.rows, template, config.columns)
    return _Part(rows, taken.extent, [*notes, *splits.told("held-out", taken.split)])


def _refuse_training_rows(dataset: str, held_out: Extent, training: Extent | None) -> None:
    if training and held_out.meets(training):
        raise DataError(
            f"--eval_dataset {dataset}: its split {', '.join(held_out.spans)} holds rows that are trained on; name "
            "another split with --eval_split, or another dataset, or hold out --eval_rows N"
        )


def _describe_duplicates(train: RowStore, held_out: RowStore, which: str = "") -> Iterator[str]:
    """Sentences about training rows that stand there more than once, and about held-out rows that are trained on."""
    different = np.unique(train.hashes)
    if again := len(train) - len(different):
        yield f"{again:,} of {which}{len(train):,} training rows are there before"
    if both := int(np.isin(held_out.hashes, different).sum()):
        yield f"warning: {both:,} of {len(held_out):,} held-out rows are among {which or 'the '}training rows, too"


def _check_config_name(config: TrainConfig) -> None:
    data = config.data
    there = [name for name in (data.dataset, data.held_out) if name]
    if data.dataset_config_name and not any(not is_mini_task(name) and path_of(name) is None for name in there):
        raise ConfigError(
            f"--dataset_config_name {data.dataset_config_name} is for a hub dataset, which {data.dataset} is not; "
            "leave it out"
        )


def make_loader(config: TrainConfig, rows: Rows, data: Tokenized, tokenizer: Any, rows_per_step: int) -> WindowLoader:
    """Of all examples, or of a stream's rows, which become examples in time; those then raise DataError."""
    if rows.source is None:
        return ListLoader(data.examples, config.training, rows_per_step)
    template, cut = make_template(config), (config.data.max_length, config.data.truncation_side)

    def encoded(raws: Sequence[Raw]) -> list[Encoded]:
        checked = [check_row(*placed(raw), template, config.columns) for raw in raws]
        return encode(checked, [place for place, _ in raws], tokenizer, template, *cut)

    name = str(config.data.dataset)
    return StreamLoader(rows.source, encoded, config.training, rows_per_step, config.data.buffer_size, name)


def tokenize_rows(
    config: TrainConfig, template: Template, tokenizer: Any, rows: Rows
) -> tuple[Tokenized, Tokenized | None]:
    """Examples of training and held-out rows (of a stream, of its first rows); a bar shows on a terminal.

    Raises:
        DataError: as of `data.tokenize`.
    """
    progress = sys.stderr.isatty() and is_main()
    cut = (config.data.max_length, config.data.truncation_side)

    def examples(rows: RowStore) -> Tokenized:
        def make() -> Tokenized:
            return tokenize(rows, tokenizer, template, *cut, progress, config.data.preprocessing_num_workers)

        if template.spec == CHAT:  # may depend on whatever the template looks at, the date for one
            return make()
        read, write = not config.data.overwrite_cache, not config.training.dry_run
        return cached(make, rows, tokenizer, template.spec, *cut, read=read, write=write)

    return examples(rows.train), examples(rows.held_out) if rows.held_out else None


def _made_rows(dataset: str, split: str, template: Template) -> RowStore:
    made = mini_rows(dataset.removeprefix("mini:"), split)
    return RowStore(check_fields(f"{dataset}, row {n}", row, template) for n, row in enumerate(made, start=1))
