"""Load a BLOOM without its blocks, which stay on the meta device, and list where the blocks' values are stored."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from softprompt.models.bloom_weights import is_bloom
from softprompt.models.loading import load_config, word_embeddings
from softprompt.models.quantization import check_not_stored_quantized
from softprompt.utils import hub
from softprompt.utils.errors import ModelError
from softprompt.utils.safetensors_io import StoredTensor, list_stored_tensors

PREFIX = "transformer."  # begins all tensor names except the head's; in the files of BLOOMs on the hub it is missing


class MetaModel(NamedTuple):
    """A base whose blocks are on the meta device (shapes and dtypes without values), and, by the names of the blocks'
    tensors, where their values are stored."""

    base: PreTrainedModel
    blocks: dict[str, StoredTensor]


def load_meta_model(name_or_path: str, flag: str = "--stream_base") -> MetaModel:
    """Load a BLOOM from a folder or the hub onto the CPU, except for its blocks.

    Args:
        flag: The flag that asked for this, for error messages.

    Raises:
        ModelError: The base does not exist, is no BLOOM, is stored quantized, has no safetensors files, or its files do
            not fit its configuration.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(name_or_path)
    check_not_stored_quantized(config, name_or_path, flag)
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
    blocks, outside_blocks = {}, {}
    for name, expected in base.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        stored = blocks[name] = _find(files, name, tuple(expected.shape), name_or_path)
        stored.dtype = dtype
        if not name.startswith(PREFIX + "h."):
            outside_blocks[name] = torch.empty(stored.shape, dtype=dtype)
            blocks.pop(name).read_into(outside_blocks[name])
    base.load_state_dict(outside_blocks, strict=False, assign=True)
    if config.tie_word_embeddings:
        head.weight = words.weight
    return MetaModel(base, blocks)


def _folder(name_or_path: str) -> Path:
    """Return the folder of a base's files; those of a hub id are downloaded if they are not in the cache."""
    from huggingface_hub import snapshot_download

    if os.path.isdir(name_or_path):
        return Path(name_or_path)
    try:
        return Path(snapshot_download(name_or_path, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # huggingface_hub, httpx and the disk raise different errors for the same cause
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ModelError(f"base model {name_or_path!r} cannot be fetched: {reason} ({hub.advice()})") from None


def _dtype(config: Any, files: Iterable[StoredTensor]) -> torch.dtype:
    """Return the dtype that transformers chooses for `dtype="auto"`: that of the configuration, else that of the first
    tensor."""
    named = getattr(config, "dtype", None)
    named = getattr(torch, named) if isinstance(named, str) else named
    return named or next((stored.file_dtype for stored in files), torch.float32)


def _find(files: dict[str, StoredTensor], name: str, shape: tuple[int, ...], base: str) -> StoredTensor:
    found = files.get(name) or files.get(name.removeprefix(PREFIX))
    if found is None:
        raise ModelError(f"{base}: its safetensors files lack the tensor {name}, which its config.json requires")
    if found.shape != shape:
        raise ModelError(
            f"{found.file.name}: tensor {name} has the shape {list(found.shape)}, but config.json "
            f"requires {list(shape)}"
        )
    return found
