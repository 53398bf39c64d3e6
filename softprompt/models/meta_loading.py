"""Load a decoder except for the parameters of its layers: these stay on the meta device (shapes and dtypes without
values), and the result says where they are stored."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from transformers import PreTrainedModel

from softprompt.models.capabilities import check_supports_prompt
from softprompt.models.decoder_layers import decoder_layers
from softprompt.models.loading import load_config
from softprompt.models.quantization import check_not_stored_quantized
from softprompt.models.stored_weights import locate_tensors
from softprompt.utils import hub
from softprompt.utils.errors import ModelError, first_line, loading_error
from softprompt.utils.safetensors_io import StoredTensor, list_stored_tensors


class MetaModel(NamedTuple):
    """A base whose layers are not loaded.

    Attributes:
        base: The base; the parameters of its layers are on the meta device.
        blocks: Where these parameters are stored, by their names in `base`.
    """

    base: PreTrainedModel
    blocks: dict[str, StoredTensor]


def load_meta_model(name_or_path: str, flag: str = "--stream_base") -> MetaModel:
    """Load a causal language model from a folder or the hub onto the CPU, except for the parameters of its layers.

    Args:
        flag: The flag that asked for this, for error messages.

    Raises:
        ModelError: The base does not exist or is unsuitable (see `loading.read_base`), it is stored quantized, its
            layers cannot be found (see `decoder_layers`), it has no safetensors files, or these do not fit its
            configuration (see `stored_weights.locate_tensors`).
    """
    config = load_config(name_or_path)
    check_not_stored_quantized(config, name_or_path, flag)
    files = list_stored_tensors(_folder(name_or_path), flag)
    base = _without_values(config, _dtype(config, files.values()), name_or_path)
    check_supports_prompt(base, name_or_path)
    stored = locate_tensors(base, files, flag)
    layers = decoder_layers(base, flag)
    in_layers = {id(p) for layer in layers.layers for p in layer.parameters()}
    of_layers = {name: _found(stored, name, name_or_path) for name, p in base.named_parameters() if id(p) in in_layers}
    _read_outside(base, {name: each for name, each in stored.items() if name not in of_layers})
    for name, tensor in base.state_dict().items():
        if tensor.is_meta and name not in of_layers:
            _found(stored, name, name_or_path)
    return MetaModel(base, of_layers)


def _without_values(config: Any, dtype: torch.dtype, name_or_path: str) -> PreTrainedModel:
    """Build a base from its configuration, in eval mode, with its parameters on the meta device.

    Buffers that files do not hold, such as rotary frequencies, are on the CPU and have their values: as in
    `from_pretrained`, the model's own initialization computes them.

    Raises:
        ModelError: Transformers cannot build a causal language model from it.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            base = cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, dtype=dtype).eval())
        for name, buffer in base.named_non_persistent_buffers():
            path, _, own_name = name.rpartition(".")
            base.get_submodule(path)._buffers[own_name] = torch.empty_like(buffer, device="cpu")
        base.initialize_weights()
    except Exception as error:  # ValueError, ImportError, or whatever the model class raises
        raise loading_error("base model", name_or_path, error) from None
    return base


def _read_outside(base: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> None:
    """Read these tensors, and tie those that the base ties, as transformers does after loading."""
    values = {name: torch.empty(each.shape, dtype=each.dtype) for name, each in stored.items()}
    for name, each in stored.items():
        each.read_into(values[name])
    base.load_state_dict(values, strict=False, assign=True)
    base.tie_weights(missing_keys=base.state_dict().keys() - stored.keys(), recompute_mapping=False)


def _found(stored: Mapping[str, StoredTensor], name: str, name_or_path: str) -> StoredTensor:
    if name not in stored:
        raise ModelError(
            f"{name_or_path}: its safetensors files lack the tensor {name}, which its config.json requires; fetch the "
            "base's files again"
        )
    return stored[name]


def _folder(name_or_path: str) -> Path:
    """Return the folder of a base's files; those of a hub id are downloaded if they are not in the cache."""
    from huggingface_hub import snapshot_download

    if os.path.isdir(name_or_path):
        return Path(name_or_path)
    try:
        return Path(snapshot_download(name_or_path, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # huggingface_hub, httpx and the disk raise different errors for the same cause
        reason = first_line(error)
        raise ModelError(f"base model {name_or_path!r} cannot be fetched: {reason} ({hub.advice()})") from None


def _dtype(config: Any, files: Iterable[StoredTensor]) -> torch.dtype:
    """Return the dtype that transformers chooses for `dtype="auto"`: that of the configuration, else that of the first
    floating-point tensor."""
    named = getattr(config, "dtype", None)
    named = getattr(torch, named) if isinstance(named, str) else named
    floating = (stored.file_dtype for stored in files if stored.file_dtype.is_floating_point)
    return named or next(floating, torch.float32)
