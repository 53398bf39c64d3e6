"""Build the data of a run from its settings: read the rows, tokenize them, and make the loader."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from softprompt.config.data_args import is_mini_task
from softprompt.config.loader import TrainConfig
from softprompt.data.dataloader import ListLoader, WindowLoader
from softprompt.data.dataset import check_fields, check_row, check_rows, rows_of
from softprompt.data.encoding import Encoded, encode
from softprompt.data.messages import texts_of
from softprompt.data.readers import local_path
from softprompt.data.row_store import RowStore
from softprompt.data.splits import Selection, find_splits
from softprompt.data.stream_loader import StreamLoader
from softprompt.data.stream_sources import Raw, Source, open_source, parse_row, skip_first
from softprompt.data.template import CHAT, Template
from softprompt.data.token_cache import cached
from softprompt.data.tokenization import Tokenized, tokenize
from softprompt.mini import rows as mini_rows
from softprompt.mini.scope import ROWS_JUDGED, foreign_note, is_mini
from softprompt.utils.errors import ConfigError, DataError

ROWS_CHECKED_FIRST = 1000  # rows at the beginning of a stream that are checked before the run


def make_template(config: TrainConfig) -> Template:
    """Return the template that --template chooses.

    Raises:
        ConfigError: See `Template`.
    """
    return Template(config.data.template or "default", date=config.data.chat_template_date)


class Rows(NamedTuple):
    """Training rows and held-out rows.

    With --streaming, `source` yields the training rows, and `train` holds only the first of them. `notices` are
    sentences for the user about the origin of the rows.
    """

    train: RowStore
    held_out: RowStore
    source: Source | None = None
    notices: Sequence[str] = ()

    @property
    def fingerprints(self) -> dict[str, str]:
        """The fingerprints of the training rows and of the held-out rows, under the names that messages use."""
        of_training = self.source.fingerprint if self.source else self.train.fingerprint
        return {"dataset": of_training, "held-out rows": self.held_out.fingerprint}

    @property
    def seen(self) -> list[bool]:
        """For each held-out row, whether it is equal to a row of `train`."""
        return np.isin(self.held_out.hashes, self.train.hashes).tolist()


class _Part(NamedTuple):
    """Rows of a dataset, the `Selection` that describes them (None if they were generated in memory), and notices about
    them."""

    rows: RowStore
    selection: Selection | None = None
    notices: Sequence[str] = ()


def read_rows(config: TrainConfig, template: Template) -> Rows:
    """Read training and held-out rows.

    Held-out rows come from --eval_dataset or --eval_split, from the end of the dataset with --eval_rows (from the
    beginning of a stream), or from a mini task's own held-out sentences.

    Raises:
        DataError: A dataset cannot be read, has no such split or no rows; --eval_rows leaves no rows to train on; a row
            lacks a column that the template needs (for a stream, only its first rows are checked); or the split of the
            held-out rows overlaps that of the training rows.
        ConfigError: A stream has an unknown number of rows and --max_steps is missing, or --dataset_config_name is
            given without a hub dataset.
    """
    _check_config_name(config)
    rows = (_open if config.data.streaming else _read)(config, template, str(config.data.dataset))
    return rows._replace(notices=[*rows.notices, *note_on_mini(config, rows)])


def note_on_mini(config: TrainConfig, rows: Rows) -> Iterator[str]:
    """Say what the mini base is if most of the first training rows or held-out rows are foreign to it."""
    if not is_mini(config.model.model_name_or_path):
        return
    groups = config.data, config.distillation
    given = {name: value for name, value in config.given.items() if any(hasattr(group, name) for group in groups)}
    for part in (rows.train, rows.held_out):
        if note := foreign_note(map(texts_of, part[:ROWS_JUDGED]), given):
            yield note
            return


def _read(config: TrainConfig, template: Template, dataset: str) -> Rows:
    """Read all rows into memory."""
    data = config.data
    rows, selection, notices = _training(config, template, dataset)
    if data.eval_rows:
        if data.eval_rows >= len(rows):
            raise DataError(
                f"--eval_rows {data.eval_rows} leaves none of the {len(rows):,} rows of {dataset} to train on; give "
                "fewer"
            )
        held_out = _Part(rows.split_off(data.eval_rows))
    else:
        held_out = _held_out(config, template, selection)
    doubled = [] if is_mini_task(dataset) else describe_duplicates(rows, held_out.rows)
    return Rows(rows, held_out.rows, notices=[*notices, *held_out.notices, *doubled])


def _open(config: TrainConfig, template: Template, dataset: str) -> Rows:
    data = config.data
    source = open_source(dataset, data.dataset_config_name, data.dataset_split, keep=not config.training.dry_run)
    if source.rows is None and config.training.max_steps <= 0:
        raise ConfigError(
            f"--max_steps is missing: the number of rows of {dataset} is unknown until all have been read, so give the "
            "number of optimizer steps"
        )
    held = data.eval_rows
    beginning = islice(source.read(0), held + ROWS_CHECKED_FIRST)
    first = check_rows(dataset, map(parse_row, beginning), template, config.columns)
    if not first:
        raise DataError(f"{dataset} holds no rows; expected at least one")
    if held >= len(first):
        raise DataError(
            f"--eval_rows {held} leaves none of the {len(first):,} rows of {dataset} to train on; give fewer"
        )
    held_out = _Part(first[:held]) if held else _held_out(config, template, source.selection)
    notices = [*source.notices, *held_out.notices, *describe_duplicates(first[held:], held_out.rows, "the first ")]
    return Rows(first[held:], held_out.rows, skip_first(source, held), notices)


def _training(config: TrainConfig, template: Template, dataset: str) -> _Part:
    if is_mini_task(dataset):
        return _Part(mini_task_rows(dataset, "train", template))
    data = config.data
    splits = find_splits(dataset, data.dataset_config_name)
    selected = splits.select(data.dataset_split, "--dataset_split")
    rows = rows_of(dataset, selected.rows, template, config.columns)
    return _Part(rows, selected.selection, [*splits.notices, *splits.describe_split("training", selected.split)])


def _held_out(config: TrainConfig, template: Template, training: Selection | None) -> _Part:
    """Read the held-out rows of --eval_dataset or --eval_split. With --streaming, only that split of a hub dataset is
    downloaded."""
    data, dataset = config.data, config.data.held_out
    if dataset is None:
        return _Part(RowStore())
    if is_mini_task(dataset):
        return _Part(mini_task_rows(dataset, "eval", template))
    flag, name = "--eval_split", data.dataset_config_name
    if data.streaming and local_path(dataset) is None:
        source = open_source(dataset, name, data.eval_split, flag=flag)
        _refuse_training_rows(dataset, source.selection, training)
        return _Part(check_rows(dataset, map(parse_row, source.read(0)), template, config.columns), source.selection)
    splits = find_splits(dataset, name)
    selected = splits.select(data.eval_split, flag)
    _refuse_training_rows(dataset, selected.selection, training)
    notices = [] if dataset == data.dataset else splits.notices
    rows = rows_of(dataset, selected.rows, template, config.columns)
    return _Part(rows, selected.selection, [*notices, *splits.describe_split("held-out", selected.split)])


def _refuse_training_rows(dataset: str, held_out: Selection, training: Selection | None) -> None:
    if training and held_out.overlaps(training):
        raise DataError(
            f"--eval_dataset {dataset}: its split {', '.join(held_out.ranges)} holds rows that are trained on; name "
            "another split with --eval_split, or another dataset, or hold out --eval_rows N"
        )


def describe_duplicates(train: RowStore, held_out: RowStore, which: str = "") -> Iterator[str]:
    """Count the training rows that repeat an earlier one, and the held-out rows that are also training rows."""
    if again := len(train) - len(np.unique(train.hashes)):
        yield f"{again:,} of {which}{len(train):,} training rows repeat an earlier row"
    if both := sum(Rows(train, held_out).seen):
        yield (
            f"warning: {both:,} of {len(held_out):,} held-out rows are among {which or 'the '}training rows, too; "
            "whether the prompt is useful is judged without them"
        )


def _check_config_name(config: TrainConfig) -> None:
    data = config.data
    there = [name for name in (data.dataset, data.held_out) if name]
    if data.dataset_config_name and not any(not is_mini_task(name) and local_path(name) is None for name in there):
        raise ConfigError(
            f"--dataset_config_name {data.dataset_config_name} is for a hub dataset, which {data.dataset} is not; "
            "leave it out"
        )


def make_loader(config: TrainConfig, rows: Rows, data: Tokenized, tokenizer: Any, rows_per_step: int) -> WindowLoader:
    """Make the loader of a run. The rows of a stream are tokenized as they are read, so the loader may then raise
    DataError."""
    if rows.source is None:
        return ListLoader(data.examples, config.training, rows_per_step)
    template, cut = make_template(config), (config.data.max_length, config.data.truncation_side)

    def encoded(raws: Sequence[Raw]) -> list[Encoded]:
        checked = [check_row(*parse_row(raw), template, config.columns) for raw in raws]
        return encode(checked, [place for place, _ in raws], tokenizer, template, *cut)

    name = str(config.data.dataset)
    return StreamLoader(rows.source, encoded, config.training, rows_per_step, config.data.buffer_size, name)


def tokenize_rows(
    config: TrainConfig, template: Template, tokenizer: Any, rows: Rows
) -> tuple[Tokenized, Tokenized | None]:
    """Tokenize the training rows (of a stream, its first rows) and the held-out rows.

    Raises:
        DataError: See `tokenization.tokenize`.
    """
    cut = (config.data.max_length, config.data.truncation_side)

    def examples(rows: RowStore) -> Tokenized:
        def make() -> Tokenized:
            return tokenize(rows, tokenizer, template, *cut, config.data.preprocessing_num_workers)

        if template.spec == CHAT:  # a chat template may depend on more than the row, such as the date
            return make()
        read, write = not config.data.overwrite_cache, not config.training.dry_run
        return cached(make, rows, tokenizer, template.spec, *cut, read=read, write=write)

    return examples(rows.train), examples(rows.held_out) if rows.held_out else None


def mini_task_rows(dataset: str, split: str, template: Template) -> RowStore:
    """Make the rows of a task of the mini base, such as mini:sentiment."""
    made = mini_rows(dataset.removeprefix("mini:"), split)
    return RowStore(check_fields(f"{dataset}, row {n}", row, template) for n, row in enumerate(made, start=1))
