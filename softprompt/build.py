"""From settings to what a run is made of: its folder, its base, and the prompt's first values."""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.arguments import DEFAULT_NUM_VIRTUAL_TOKENS, DEFAULT_VOCAB_POPULATION
from softprompt.checkpoint import load_adapter, step_of
from softprompt.config import TrainConfig
from softprompt.errors import AdapterError, ConfigError, OutputError
from softprompt.faults import parse_labels
from softprompt.files import check_writable
from softprompt.lock import FolderLock, refuse_locked
from softprompt.mini import BASE_DIR
from softprompt.model import EmbeddedWords
from softprompt.prompt import (
    Initialiser,
    class_label_init,
    random_init,
    sample_of_init,
    sample_vocab_init,
    token_init,
)
from softprompt.run_files import refuse_foreign_files, refuse_other_run
from softprompt.vocabulary import frequent_tokens, label_tokens

RUNS = Path("runs")


def base_path(name: str) -> str:
    """Where a base is loaded from: `mini` is this package's own, all else a folder or a hub id."""
    return str(BASE_DIR) if name == "mini" else name


def choose_output_dir(config: TrainConfig, checkpoint: Path | None) -> Path:
    """The folder of this run, not yet made.

    Raises:
        OutputError: it is a file, cannot be written to, or holds another run than the one that `checkpoint` is of, or
            files of somebody else's that the run would replace, or another process is writing there.
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


def goes_on_in(output_dir: Path, checkpoint: Path | None) -> bool:
    """Whether the run in `output_dir` is the one that `checkpoint` is of; all else that stands there is another's."""
    here = output_dir.resolve()
    return checkpoint is not None and here in (checkpoint.parent.resolve(), checkpoint.resolve().parent)


def initial_prompt(config: TrainConfig, tokenizer: Any, base: PreTrainedModel) -> Tensor:
    """The prompt's first values [P, H] fp32, seeded by --seed.

    Raises:
        ConfigError: as of `initialiser`, or --num_virtual_tokens beside --init_adapter and another than its number.
        AdapterError: --init_adapter does not hold a prompt for a base of this hidden size.
    """
    words = EmbeddedWords(base)  # [V, H]
    if config.prompt.init_adapter:
        return _from_adapter(config, words.shape[1])
    torch.manual_seed(config.training.seed)
    return initialiser(config, tokenizer, len(words))(words)


def initialiser(config: TrainConfig, tokenizer: Any, vocabulary: int) -> Initialiser:
    """The way a prompt starts; `vocabulary` is V, the rows of the word embeddings.

    Raises:
        ConfigError: a text without tokens, a class label that the tokenizer cannot express, or no words to draw from.
    """
    prompt = config.prompt
    init, wanted = prompt.prompt_tuning_init, prompt.num_virtual_tokens
    if init == "TEXT":
        return token_init(tokenizer(prompt.prompt_tuning_init_text)["input_ids"], wanted)
    length = wanted or DEFAULT_NUM_VIRTUAL_TOKENS
    if init == "RANDOM":
        return random_init(length)
    if init == "SAMPLE_VOCAB" and prompt.vocab_population is None:
        return sample_vocab_init(length)
    most = prompt.vocab_population or DEFAULT_VOCAB_POPULATION
    sampled = sample_of_init(frequent_tokens(tokenizer, most, vocabulary), length)
    if init == "SAMPLE_VOCAB":
        return sampled
    return class_label_init(label_tokens(tokenizer, parse_labels(str(prompt.class_labels))), sampled)


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
    goes_on = goes_on_in(path, checkpoint)
    if not goes_on:
        refuse_other_run(path, config.training.overwrite_output_dir)
    board = config.sharing.report_to == "tensorboard"
    refuse_foreign_files(path, board, step_of(checkpoint) if checkpoint and goes_on else None)


def _numbered(path: Path) -> Iterator[Path]:
    return (path if n == 1 else path.with_name(f"{path.name}-{n}") for n in itertools.count(1))


def _made(path: Path) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir()
    except FileExistsError:
        return False
    return True


def _from_adapter(config: TrainConfig, hidden_size: int) -> Tensor:
    folder, wanted = str(config.prompt.init_adapter), config.prompt.num_virtual_tokens
    prompt = load_adapter(folder).prompt
    check_fits(folder, prompt, hidden_size, str(config.model.model_name_or_path))
    if wanted not in (None, prompt.shape[0]):
        raise ConfigError(f"--num_virtual_tokens {wanted}: --init_adapter {folder} has {prompt.shape[0]}; leave it out")
    return prompt
