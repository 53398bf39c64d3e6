"""A BLOOM without its blocks: what a program asks of a base, with the blocks left where they are stored."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from softprompt.models.bloom_weights import is_bloom
from softprompt.models.loading import base_config, word_embeddings
from softprompt.utils import hub
from softprompt.utils.errors import ModelError
from softprompt.utils.safetensors_io import StoredTensor, list_stored_tensors

PREFIX = "transformer."  # of all names but the head's; the hub's own BLOOMs are stored without it


class MetaModel(NamedTuple):
    """`base` has its blocks on the meta device: names, shapes and dtypes, not values. Those are in `blocks`, under the
    same names."""

    base: PreTrainedModel
    blocks: dict[str, StoredTensor]


def load_meta_model(name_or_path: str, flag: str = "--stream_base") -> MetaModel:
    """A BLOOM from a local folder or the hub, on the CPU, all but its blocks as `model.read_base` loads it; `flag` is
    what asked for it.

    Raises:
        ModelError: not there, not BLOOM, without safetensors, or with files that are not what its configuration says.
    """
    from transformers import AutoModelForCausalLM

    config = base_config(name_or_path)
    if not is_bloom(config):
        raise ModelError(
            f"{flag} is for BLOOM, and {name_or_path} is of type {config.model_type}"
            + (" with slow_but_exact" if config.model_type == "bloom" else "")
            + "; leave it out"
        )
    files = list_stored_tensors(_folder(name_or_path), flag)
    dtype = _dtype(config, files.values())
    with torch.device("meta"):
        base = cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, dtype=dtype).eval())
    head, words = cast(nn.Linear, base.get_output_embeddings()), word_embeddings(base)
    blocks, frame = {}, {}
    for name, expected in base.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        stored = blocks[name] = _find(files, name, tuple(expected.shape), name_or_path)
        stored.dtype = dtype
        if not name.startswith(PREFIX + "h."):
            frame[name] = torch.empty(stored.shape, dtype=dtype)
            blocks.pop(name).read_into(frame[name])
    base.load_state_dict(frame, strict=False, assign=True)
    if config.tie_word_embeddings:
        head.weight = words.weight
    return MetaModel(base, blocks)


def _folder(name_or_path: str) -> Path:
    """Where its files are; those of a hub id are fetched, if they are not in the cache."""
    from huggingface_hub import snapshot_download

    if os.path.isdir(name_or_path):
        return Path(name_or_path)
    try:
        return Path(snapshot_download(name_or_path, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # of huggingface_hub, of httpx, of the disk: all mean the same here
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ModelError(f"base model {name_or_path!r} cannot be fetched: {reason} ({hub.advice()})") from None


def _dtype(config: Any, files: Iterable[StoredTensor]) -> torch.dtype:
    """Of the model, as transformers' dtype="auto" has it: its configuration's, else that of its first tensor."""
    named = getattr(config, "dtype", None)
    named = getattr(torch, named) if isinstance(named, str) else named
    return named or next((stored.file_dtype for stored in files), torch.float32)


def _find(files: dict[str, StoredTensor], name: str, shape: tuple[int, ...], base: str) -> StoredTensor:
    found = files.get(name) or files.get(name.removeprefix(PREFIX))
    if found is None:
        raise ModelError(f"{base}: its safetensors files have no tensor {name}, which its config.json asks for")
    if found.shape != shape:
        raise ModelError(
            f"{found.file.name}: tensor {name} has the shape {list(found.shape)}, and {list(shape)} by config.json"
        )
    return found
