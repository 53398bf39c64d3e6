"""From settings to what a run is made of: its folder, rows, examples, and the prompt's first values."""

import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.checkpoint import load_adapter, refuse_other_run
from softprompt.config import DEFAULT_NUM_VIRTUAL_TOKENS, TrainConfig
from softprompt.data import Tokenized, tokenize
from softprompt.errors import AdapterError, ConfigError, DataError, OutputError
from softprompt.files import check_writable
from softprompt.lock import FolderLock, refuse_locked
from softprompt.mini import BASE_DIR
from softprompt.mini import rows as mini_rows
from softprompt.model import word_embeddings
from softprompt.prompt import Initialiser, random_init, sample_vocab_init, token_init
from softprompt.rows import Row, checked, load_rows
from softprompt.template import CHAT, Template
from softprompt.token_cache import cached

RUNS = Path("runs")


def base_path(name: str) -> str:
    """Where a base is loaded from: `mini` is this package's own, all else a folder or a hub id."""
    return str(BASE_DIR) if name == "mini" else name


def choose_output_dir(config: TrainConfig, checkpoint: Path | None) -> Path:
    """The folder of this run, not yet made.

    Raises:
        OutputError: it is a file, cannot be written to, or holds another run than the one that `checkpoint` is of, or
            another process is writing there.
    """
    if config.training.output_dir is not None:
        path = Path(config.training.output_dir)
        check_writable(path, "--output_dir")
        _refuse_others(config, path, checkpoint)
        return path
    name = config.preset or Path(str(config.model.model_name_or_path)).name
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    check_writable(RUNS / stem, "the default output_dir")
    return next(path for path in _numbered(RUNS / stem) if not path.exists())


def claim_output_dir(config: TrainConfig, output_dir: Path, checkpoint: Path | None) -> FolderLock:
    """Make the folder of this run and take its lock. A folder that was not named and that another process has made
    in the meantime is left to it, and the next free name is taken.

    Raises:
        OutputError: another process is writing there, or wrote a run since it was chosen, or it cannot be made.
    """
    try:
        if config.training.output_dir is None:
            output_dir = next(path for path in _numbered(output_dir) if _made(path))
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(output_dir).take()
    except OSError as error:
        raise OutputError(
            f"--output_dir {output_dir}: cannot be made ({error.strerror}); name another folder"
        ) from None
    try:
        if config.training.output_dir is not None:
            _refuse_others(config, output_dir, checkpoint, locked=True)
    except OutputError:
        lock.release()
        raise
    return lock


def read_rows(config: TrainConfig, template: Template) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows; the latter from --eval_dataset, from the dataset's end, or from a mini task's own."""
    data, dataset = config.data, str(config.data.dataset)
    rows = _load(config, template, dataset, "train")
    if data.eval_rows:
        if data.eval_rows >= len(rows):
            raise DataError(
                f"--eval_rows {data.eval_rows} leaves none of the {len(rows):,} rows of {dataset} to train on"
            )
        return rows[: -data.eval_rows], rows[-data.eval_rows :]
    held_out = data.eval_dataset or (dataset if _is_mini(dataset) else None)
    return rows, _load(config, template, held_out, "eval") if held_out else []


def tokenize_rows(
    config: TrainConfig, template: Template, tokenizer: Any, rows: list[Row], held_out: list[Row]
) -> tuple[Tokenized, Tokenized | None]:
    """Examples of training and held-out rows; a bar shows on a terminal."""
    progress = sys.stderr.isatty()
    cut = (config.data.max_length, config.data.truncation_side)

    def examples(rows: list[Row]) -> Tokenized:
        def make() -> Tokenized:
            return tokenize(rows, tokenizer, template, *cut, progress)

        if template.spec == CHAT:  # may depend on whatever the template looks at, the date for one
            return make()
        read, write = not config.data.overwrite_cache, not config.training.dry_run
        return cached(make, rows, tokenizer, template.spec, *cut, read=read, write=write)

    return examples(rows), examples(held_out) if held_out else None


def initial_prompt(config: TrainConfig, tokenizer: Any, base: PreTrainedModel) -> Tensor:
    """The prompt's first values [P, H] fp32, seeded by --seed.

    Raises:
        ConfigError: a text without tokens, or --num_virtual_tokens beside --init_adapter and another than its number.
        AdapterError: --init_adapter does not hold a prompt for a base of this hidden size.
    """
    embeddings = word_embeddings(base).weight.detach()  # [V, H]
    if config.prompt.init_adapter:
        return _from_adapter(config, embeddings.shape[1])
    torch.manual_seed(config.training.seed)
    return _initialiser(config, tokenizer)(embeddings)


def check_fits(adapter_dir: str | Path, prompt: Tensor, hidden_size: int, base_name: str) -> None:
    """Raises AdapterError where a prompt [P, H] was learned for a base of another hidden size."""
    if prompt.shape[1] != hidden_size:
        raise AdapterError(
            f"adapter {adapter_dir}: its virtual tokens have size {prompt.shape[1]}, but {base_name} has hidden size "
            f"{hidden_size}; use the base that it was trained on"
        )


def _refuse_others(config: TrainConfig, path: Path, checkpoint: Path | None, locked: bool = False) -> None:
    if not locked:
        refuse_locked(path)
    if checkpoint is None or checkpoint.parent.resolve() != path.resolve():
        refuse_other_run(path, config.training.overwrite_output_dir)


def _numbered(path: Path) -> Iterator[Path]:
    return (path if n == 1 else path.with_name(f"{path.name}-{n}") for n in itertools.count(1))


def _made(path: Path) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir()
    except FileExistsError:
        return False
    return True


def _is_mini(dataset: str) -> bool:
    return dataset.startswith("mini:")


def _load(config: TrainConfig, template: Template, dataset: str, mini_split: str) -> list[Row]:
    if _is_mini(dataset):
        made = mini_rows(dataset.removeprefix("mini:"), mini_split)
        return [checked(f"{dataset}, row {number}", row, template) for number, row in enumerate(made, start=1)]
    data = config.data
    return load_rows(dataset, template, config.columns, config_name=data.dataset_config_name, split=data.dataset_split)


def _initialiser(config: TrainConfig, tokenizer: Any) -> Initialiser:
    wanted = config.prompt.num_virtual_tokens
    if config.prompt.prompt_tuning_init == "TEXT":
        ids = tokenizer(config.prompt.prompt_tuning_init_text)["input_ids"]
        return token_init(ids, wanted)
    start = sample_vocab_init if config.prompt.prompt_tuning_init == "SAMPLE_VOCAB" else random_init
    return start(wanted or DEFAULT_NUM_VIRTUAL_TOKENS)


def _from_adapter(config: TrainConfig, hidden_size: int) -> Tensor:
    folder, wanted = str(config.prompt.init_adapter), config.prompt.num_virtual_tokens
    prompt = load_adapter(folder).prompt
    check_fits(folder, prompt, hidden_size, str(config.model.model_name_or_path))
    if wanted not in (None, prompt.shape[0]):
        raise ConfigError(f"--num_virtual_tokens {wanted}: --init_adapter {folder} has {prompt.shape[0]}; leave it out")
    return prompt
