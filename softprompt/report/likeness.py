"""What the prompt of a run resembles whose report.json does not say so: one that has not ended, or an older one. Only
the word embeddings are read from the base's files, where those are at hand."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from softprompt.models.loading import base_path, load_tokenizer, weight_files
from softprompt.prompt.adapter_io import PROMPT_KEY, Adapter, load_adapter
from softprompt.prompt.initial import check_fits
from softprompt.prompt.nearest_tokens import EmbeddingSpace
from softprompt.report.collect import likeness
from softprompt.runs.file_names import START_FILE
from softprompt.runs.run_reader import RunRecord
from softprompt.utils.errors import SoftpromptError
from softprompt.utils.safetensors_io import list_stored_tensors

WORDS, NORM = "word_embeddings.weight", "word_embeddings_layernorm"
EPSILON = 1e-5  # BloomConfig's layer_norm_epsilon, which no BLOOM has another of


def add_likeness(record: RunRecord) -> RunRecord:
    """The record, with likenesses of the prompt that there is, or why there are none."""
    end = record.facts.get("end") or {}
    folder = record.folder if record.ended else record.checkpoint and record.folder / record.checkpoint
    if not folder or not isinstance(end, dict) or "likeness" in end:
        return record
    try:
        found = {"likeness": _likeness(load_adapter(folder), record.folder)}
    except (SoftpromptError, OSError, ValueError) as error:
        found = {"left_out": [f"No likenesses: {error}"]}
    return replace(record, facts={**record.facts, "so_far": {**end, **found}})


def _likeness(adapter: Adapter, folder: Path) -> dict[str, object]:
    if adapter.base_model_name_or_path is None:
        raise ValueError("the adapter names no base")
    name = base_path(adapter.base_model_name_or_path)
    space = _space(name)
    check_fits(folder, adapter.prompt, space.words.shape[1], name)
    return likeness(space, load_tokenizer(name), adapter.prompt, _start(folder / START_FILE))


def _start(file: Path) -> Tensor | None:
    """None where it was not recorded, or what was is damaged."""
    try:
        return load_file(file)[PROMPT_KEY]
    except (OSError, SafetensorError, KeyError):
        return None


def _space(name_or_path: str) -> EmbeddingSpace:
    """Raises ValueError where the base's files are not here, or hold no BLOOM."""
    files = weight_files(name_or_path)
    if not files:
        raise ValueError(f"the base {name_or_path} is not here")
    stored = list_stored_tensors(files[0].parent)

    def read(name: str) -> Tensor:
        found = stored.get(f"transformer.{name}") or stored.get(name)
        if found is None:
            raise ValueError(f"the base {name_or_path} has no tensor {name}")
        found.read_into(values := torch.empty(found.shape, dtype=found.dtype))
        return values

    return EmbeddingSpace(read(WORDS), (read(f"{NORM}.weight"), read(f"{NORM}.bias"), EPSILON))
