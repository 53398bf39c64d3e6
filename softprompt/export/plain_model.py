"""Base and prompt as one plain transformers model folder: `python -m softprompt export ADAPTER --output DIR`.

new words          ids after the base's; their embeddings are the prompt, and they are never generated (plain.py)
tokenizer          knows them; its chat template puts them and the training template in place (chat_template.py)
generation_config  the adapter's settings; suppress_tokens names the new words
"""

import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from softprompt.engines.padded import check_forward
from softprompt.export.args import ExportConfig, export_config
from softprompt.export.bake_prompt import to_plain
from softprompt.export.chat_template import prompt_words, teach
from softprompt.export.model_card import plain_model_card
from softprompt.generation.adapters import tuned_of
from softprompt.generation.encode_questions import merged_settings
from softprompt.generation.requests import GenerationSettings
from softprompt.models.capabilities import check_vocabulary
from softprompt.models.loading import base_path, load_tokenizer, read_base, word_embeddings
from softprompt.prompt.adapter_io import Adapter, load_adapter
from softprompt.prompt.initial import check_fits
from softprompt.utils.atomic_io import check_writable, new_folder
from softprompt.utils.errors import AdapterError, ModelError, OutputError
from softprompt.utils.model_config import peft_model_sizes, text_config

# GenerationConfig refuses to save what it would not use: of sampling beside greedy answers, of beams beside one alone.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
BEAMS = ("early_stopping", "length_penalty")
UNSAVED = ("stop_strings",)  # transformers' generate refuses them unless it is handed the tokenizer


def export(adapter: str | os.PathLike[str], output: str | os.PathLike[str], **settings: Any) -> str:
    """Write the model folder `output`; `settings` are the command's flags. Returns what was written, one line.

    Raises:
        ConfigError: settings that are wrong.
        AdapterError: an adapter that is broken, names no base, or was learned for another base.
        ModelError: a base that cannot be loaded, or cannot take virtual tokens as words.
        OutputError: `output` exists, cannot be written to, or there is no room for it. Nothing is left behind.
    """
    return write_plain_model(export_config(os.fspath(adapter), output=output, **settings))


def write_plain_model(config: ExportConfig) -> str:
    """Write the folder that `config` names, as `export` does."""
    output = Path(config.output)
    _refuse_existing(output)
    check_writable(output, "--output")
    adapter = load_adapter(config.adapter)
    name = config.model_name_or_path or adapter.base_model_name_or_path
    if name is None:
        raise AdapterError(f"adapter {config.adapter}: names no base; give --model_name_or_path")
    tuned = tuned_of(config.adapter, adapter)
    tokenizer, base = load_tokenizer(base_path(name)), read_base(base_path(name))
    check_vocabulary(tokenizer, base, name)
    check_forward(base, base.dtype)
    _check_base(config.adapter, adapter, base, name)
    dtype = base.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    P = adapter.prompt.shape[0]
    _check_room(output, base, P, dtype)
    ids = teach(tokenizer, tuned.template, P)
    constant = to_plain(base, adapter.prompt, ids, dtype)
    settings = merged_settings(tuned.generation, {})
    base.generation_config = generation_config(tokenizer, settings, ids)
    words = tokenizer.convert_ids_to_tokens(ids)
    _write(output, base, tokenizer, plain_model_card(name, adapter, words, constant, str(dtype).removeprefix("torch.")))
    guard = (
        f"logit {constant:g} always" if constant is not None else "logit the mean of the others, and suppress_tokens"
    )
    return f"{output}: {name} and {P} new words, {words[0]} to {words[-1]} (never generated: {guard})"


def generation_config(tokenizer: Any, of_adapter: GenerationSettings, ids: list[int]) -> GenerationConfig:
    """The adapter's settings, with the new words `ids` suppressed, and those of earlier exports that the tokenizer has.
    The new words count in transformers' max_length, which is therefore larger by their number. What the base's own
    generation_config says has no effect, as in infer.py.

    Raises:
        ModelError: settings that transformers takes in no file.
    """
    settings = asdict(of_adapter)
    values = {name: value for name, value in settings.items() if value not in (None, ()) and name not in UNSAVED}
    if of_adapter.max_new_tokens is not None:
        values.pop("max_length", None)
    else:
        values["max_length"] = of_adapter.max_length + len(ids)
    unused = {*(() if of_adapter.do_sample else SAMPLING), *(() if of_adapter.num_beams > 1 else BEAMS)}
    values = {name: value for name, value in values.items() if name not in unused}
    values["suppress_tokens"] = sorted({*(values.get("suppress_tokens") or ()), *ids, *prompt_words(tokenizer)})
    ends = list(of_adapter.eos_token_id) or tokenizer.eos_token_id
    values |= {"eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id}
    config = GenerationConfig(**values)
    try:
        config.validate(strict=True)  # as save_pretrained does
    except ValueError as error:
        raise ModelError(f"{tokenizer.name_or_path}: generation settings cannot be saved: {error}") from None
    return config


def _check_base(folder: str, adapter: Adapter, base: PreTrainedModel, name: str) -> None:
    """Refuse a base of other sizes than the adapter names; warn of another name."""
    check_fits(folder, adapter.prompt, word_embeddings(base).embedding_dim, name)
    for key, found in peft_model_sizes(base.config).items():
        wanted = adapter.config.get(key)
        if None not in (wanted, found) and wanted != found:
            raise AdapterError(
                f"adapter {folder}: was learned for a base with {key} {wanted}, but {name} has {found}; "
                "use the base that it was trained on"
            )
    if adapter.base_model_name_or_path not in (None, name):
        print(f"warning: the adapter was trained on {adapter.base_model_name_or_path}, not on {name}", file=sys.stderr)


def _refuse_existing(output: Path) -> None:
    if os.path.lexists(output):
        raise OutputError(f"--output {output} exists already; name a folder that does not, or remove it")


def _check_room(output: Path, base: PreTrainedModel, P: int, dtype: torch.dtype) -> None:
    """Raises OutputError where the disk has no room for the weights, of which a tied head is now a tensor by itself."""
    above = output.absolute().parent
    while not above.exists():
        above = above.parent
    V, H = word_embeddings(base).weight.shape
    tied = bool(text_config(base.config).tie_word_embeddings)
    values = sum(p.numel() for p in base.parameters()) + 2 * P * H + (V * H if tied else 0)
    needed, free = values * dtype.itemsize + (64 << 20), shutil.disk_usage(above).free  # tokenizer, card
    if free < needed:
        raise OutputError(
            f"--output {output}: needs {needed / 1e9:,.2f} GB, but {above} has {free / 1e9:,.2f} GB free; name a "
            "folder on another disk, or a --dtype of 2 bytes"
        )


def _write(output: Path, base: PreTrainedModel, tokenizer: Any, card: bytes) -> None:
    logging.disable_progress_bar()
    try:
        with new_folder(output, replace=False) as folder:
            base.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            (folder / "README.md").write_bytes(card)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"--output {output}: cannot be written: {error}; nothing was kept") from None
    finally:
        logging.enable_progress_bar()
