"""Export a base with its prompt as one plain transformers model: `python -m softprompt export ADAPTER --output DIR`.
With `--engine vllm`, see `vllm`.

weights            the base's, with new tokens whose embeddings are the prompt (see `bake_prompt`)
tokenizer          with the new tokens, and a chat template that writes them before the input (see `chat_template`)
generation_config  the adapter's settings; suppress_tokens lists the new tokens
"""

import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from softprompt.engines.padded import check_forward
from softprompt.export.args import ExportArguments, export_arguments
from softprompt.export.bake_prompt import bake_prompt
from softprompt.export.chat_template import add_prompt_tokens, prompt_token_ids
from softprompt.export.model_card import plain_model_card
from softprompt.export.source import Source, open_source
from softprompt.export.vllm import write_for_vllm
from softprompt.generation.adapters import warning_of_other_base
from softprompt.generation.requests import GenerationSettings, merge_settings
from softprompt.models.capabilities import check_vocabulary
from softprompt.models.loading import base_path, load_config, load_tokenizer, read_base, word_embeddings
from softprompt.models.quantization import check_not_stored_quantized
from softprompt.prompt.adapter_io import Adapter
from softprompt.prompt.initial import check_fits
from softprompt.utils.atomic_io import new_folder
from softprompt.utils.errors import AdapterError, ModelError, OutputError
from softprompt.utils.model_config import peft_sizes, text_config
from softprompt.utils.progress import say

# GenerationConfig refuses to save settings without effect: sampling settings without do_sample, beam settings with one
# beam.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
BEAMS = ("early_stopping", "length_penalty")
UNSAVED = ("stop_strings",)  # `generate` refuses them if its caller passes no tokenizer


def export(adapter: str | os.PathLike[str], output: str | os.PathLike[str], **settings: Any) -> str:
    """Write the model folder `output` and return one line that says what was written.

    Args:
        adapter: Adapter folder.
        output: Folder to write; it must not exist.
        settings: The command's other flags as keyword arguments.

    Raises:
        ConfigError: A setting is unknown or has a wrong value.
        AdapterError: The adapter is damaged, names no base, or does not fit the base.
        ModelError: The base cannot be loaded, or no tokens can be added to it.
        OutputError: `output` exists, cannot be written to, or the disk is full. Nothing is left behind.
    """
    folder = os.fspath(adapter)
    return write_export(folder, export_arguments(folder, output=output, **settings))


def write_export(folder: str, arguments: ExportArguments) -> str:
    """Write the adapter in `folder` as `arguments` say; see `export`."""
    source = open_source(folder, arguments)
    return write_for_vllm(source) if arguments.engine == "vllm" else _write_plain_model(source)


def _write_plain_model(source: Source) -> str:
    folder, adapter, tuned, name, output, dtype_name = source
    check_not_stored_quantized(load_config(base_path(name)), name, "an export")
    tokenizer, base = load_tokenizer(base_path(name)), read_base(base_path(name))
    check_vocabulary(tokenizer, base, name)
    check_forward(base, base.dtype)
    _check_sizes(folder, adapter, base, name)
    dtype = base.dtype if dtype_name == "auto" else getattr(torch, dtype_name)
    P = adapter.prompt.shape[0]
    _check_room(output, base, P, dtype)
    ids = add_prompt_tokens(tokenizer, tuned.template, P)
    constant = bake_prompt(base, adapter.prompt, ids, dtype)
    settings = merge_settings(tuned.generation, {})
    base.generation_config = generation_config(tokenizer, settings, ids)
    names = tokenizer.convert_ids_to_tokens(ids)
    _write(output, base, tokenizer, plain_model_card(name, adapter, names, constant, str(dtype).removeprefix("torch.")))
    guard = (
        f"their logit is {constant:g}"
        if constant is not None
        else "their logit is the mean of the others, and suppress_tokens lists them"
    )
    return f"{output}: {name} and {P} new tokens, {names[0]} to {names[-1]} (never generated: {guard})"


def generation_config(tokenizer: Any, of_adapter: GenerationSettings, ids: list[int]) -> GenerationConfig:
    """Return the adapter's generation settings for a generation_config.json.

    All tokens of exported prompts are suppressed: the new ones, `ids`, and those of earlier exports. transformers
    counts the new tokens in max_length, which is therefore increased by their number. As in infer.py, the base's own
    generation_config has no effect.

    Raises:
        ModelError: Transformers refuses to save these settings.
    """
    settings = asdict(of_adapter)
    values = {name: value for name, value in settings.items() if value not in (None, ()) and name not in UNSAVED}
    if of_adapter.max_new_tokens is not None:
        values.pop("max_length", None)
    else:
        values["max_length"] = of_adapter.max_length + len(ids)
    unused = {*(() if of_adapter.do_sample else SAMPLING), *(() if of_adapter.num_beams > 1 else BEAMS)}
    values = {name: value for name, value in values.items() if name not in unused}
    values["suppress_tokens"] = sorted({*(values.get("suppress_tokens") or ()), *ids, *prompt_token_ids(tokenizer)})
    ends = list(of_adapter.eos_token_id) or tokenizer.eos_token_id
    values |= {"eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id}
    config = GenerationConfig(**values)
    try:
        config.validate(strict=True)  # as save_pretrained does
    except ValueError as error:
        raise ModelError(
            f"{tokenizer.name_or_path}: generation settings cannot be saved ({error}); change `generation` in the "
            "adapter's softprompt.json"
        ) from None
    return config


def _check_sizes(folder: str, adapter: Adapter, base: PreTrainedModel, name: str) -> None:
    """Raise AdapterError if the base has other sizes than the adapter's configuration; warn if it is another base."""
    check_fits(folder, adapter.prompt, word_embeddings(base).embedding_dim, name)
    for key, found in peft_sizes(base.config).items():
        wanted = adapter.config.get(key)
        if None not in (wanted, found) and wanted != found:
            raise AdapterError(
                f"adapter {folder}: was trained for a base with {key} {wanted}, but {name} has {found}; "
                "use the base that it was trained on"
            )
    if warning := warning_of_other_base(folder, adapter.base_model_name_or_path, name):
        say(warning)


def _check_room(output: Path, base: PreTrainedModel, P: int, dtype: torch.dtype) -> None:
    """Raise OutputError if the disk has too little space for the weights. A tied head becomes a tensor of its own."""
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    V, H = word_embeddings(base).weight.shape
    tied = bool(text_config(base.config).tie_word_embeddings)
    values = sum(p.numel() for p in base.parameters()) + 2 * P * H + (V * H if tied else 0)
    needed = values * dtype.itemsize + (64 << 20)  # 64 MiB for the tokenizer and the card
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(
            f"--output {output}: needs {needed / 1e9:,.2f} GB, but {parent} has {free / 1e9:,.2f} GB free; name a "
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
        raise OutputError(f"--output {output}: cannot be written: {error}; nothing was left behind") from None
    finally:
        logging.enable_progress_bar()
