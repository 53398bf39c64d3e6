"""Load a frozen base and its tokenizer from a folder or the hub."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from softprompt.mini import BASE_DIR
from softprompt.models.capabilities import check_takes_prompt
from softprompt.utils import hub
from softprompt.utils.errors import ModelError


def load_tokenizer(name_or_path: str) -> Any:
    """The base's tokenizer; a missing pad token is the end token, whose labels are masked anyway.

    Raises:
        ModelError: the base or its tokenizer is not there or not loadable, or has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = from_hub_or_folder(AutoTokenizer, name_or_path, "tokenizer")
    except ModelError:
        base_config(name_or_path)  # where there is no base, or none that fits, that is what to say
        raise
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{name_or_path}: its tokenizer has no eos_token, so an answer would have no end; set one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def base_config(name_or_path: str) -> Any:
    """The configuration of a base, which is all that it takes to see that it cannot be one.

    Raises:
        ModelError: not there, not loadable, quantised, or no causal language model of transformers.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, AutoConfig

    config = from_hub_or_folder(AutoConfig, name_or_path, "base model")
    named = f"{name_or_path}: a model of type {config.model_type}"
    wanted = "give --model_name_or_path a causal one (BLOOM, Llama, Qwen, …)"
    for one in (config, config.get_text_config()):
        if quantization := getattr(one, "quantization_config", None) or getattr(one, "compression_config", None):
            raise _quantised(name_or_path, config.model_type, quantization)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{named} has an encoder and a decoder, and prompts are learned for a decoder alone; {wanted}")
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise ModelError(f"{named} is an encoder, whose words see the words after them; {wanted}")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{named} is no causal language model of transformers; {wanted}")
    return config


def _quantised(name: str, model_type: str, quantization: Any) -> ModelError:
    given = quantization if isinstance(quantization, dict) else vars(quantization)
    method = getattr(given.get("quant_method"), "value", given.get("quant_method")) or "by an unknown method"
    instead = ", which --load_in_4bit of train.py and infer.py quantises as it loads it"
    return ModelError(
        f"{name}: its weights are stored quantised ({method}), and prompts are learned over weights that are not; give "
        f"--model_name_or_path the unquantised base{instead if model_type == 'bloom' else ''}"
    )


def refuse_quantised(base: PreTrainedModel) -> None:
    """Raises ModelError where transformers loaded a base's weights quantised: to cast them leaves their scales out."""
    if getattr(base, "hf_quantizer", None) is not None:
        name, method = str(base.name_or_path), getattr(base.hf_quantizer, "quantization_config", None)
        raise _quantised(name, base.config.model_type, method or {})


def load_base(name_or_path: str, device: torch.device, compute_dtype: torch.dtype) -> PreTrainedModel:
    """A causal language model, frozen and in eval mode: `read_base`, then `freeze`.

    Raises:
        ModelError: as of `read_base`.
    """
    return place(freeze(read_base(name_or_path), compute_dtype), device)


def read_base(name_or_path: str) -> PreTrainedModel:
    """A causal language model on the CPU, its weights as they are in its files.

    Raises:
        ModelError: as of `base_config`, or as of `capabilities.check_takes_prompt`.
    """
    from transformers import AutoModelForCausalLM

    base_config(name_or_path)
    base = cast(PreTrainedModel, from_hub_or_folder(AutoModelForCausalLM, name_or_path, "base model", dtype="auto"))
    check_takes_prompt(base, name_or_path)
    return base


def weight_files(name_or_path: str) -> list[Path]:
    """The files of a base's weights, in its folder or in the hub's cache; none where they are not found."""
    from huggingface_hub import try_to_load_from_cache

    if not os.path.isdir(name_or_path):
        config = try_to_load_from_cache(name_or_path, "config.json")
        if not isinstance(config, str):
            return []
        name_or_path = os.path.dirname(config)
    return sorted(path for pattern in ("*.safetensors", "*.bin") for path in Path(name_or_path).glob(pattern))


def word_embeddings(base: PreTrainedModel) -> nn.Embedding:
    """The base's embedding of words, weight [V, H]."""
    return cast(nn.Embedding, base.get_input_embeddings())


def freeze(base: PreTrainedModel, compute_dtype: torch.dtype) -> PreTrainedModel:
    """Freeze `base` in place and put it in eval mode.

    Matrices are kept in `compute_dtype`: autocast would cast them to it at every use, with the same result. All else
    (embeddings, norms, biases, a tied head) is fp32, whatever dtype the files have.

    Raises:
        ModelError: a base that transformers loaded quantised.
    """
    refuse_quantised(base)
    base.requires_grad_(False).eval()
    matrices = {id(matrix) for module in base.modules() for matrix in _matrices(module)}
    matrices.discard(id(word_embeddings(base).weight))
    for parameter in base.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(compute_dtype if id(parameter) in matrices else torch.float32)
    return base


def _matrices(module: nn.Module) -> Iterator[nn.Parameter]:
    """A module's own parameters that only enter matrix products: the weights [out, in] of linear layers, [in, out] of
    GPT-2's Conv1D, and experts' in one tensor [experts, …, …]. Routers are small, and some are to stay in fp32.

    transformers' grouped product of experts is not under autocast: it takes the dtype of its weights, which is thereby
    the compute dtype, as for all other products."""
    if isinstance(module, nn.Linear | Conv1D):
        yield module.weight
    elif not isinstance(module, nn.Embedding | nn.modules.conv._ConvNd):
        yield from (p for p in module.parameters(recurse=False) if p.dim() == 3 and min(p.shape[1:]) > 1)


def place(base: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Move `base` to a device in place, but for what is on the meta device."""
    for tensor in (*base.parameters(), *base.buffers()):
        if not tensor.is_meta:
            tensor.data = tensor.data.to(device)
    return base


def from_hub_or_folder(auto_class: Any, name_or_path: str, what: str, **kwargs: Any) -> Any:
    """What an Auto class of transformers loads from a folder or the hub.

    Raises:
        ModelError: `what` is not there or cannot be loaded.
    """
    from transformers.utils import logging

    looked = ""
    if not os.path.isdir(name_or_path):
        place = os.path.abspath(name_or_path)
        if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1 or os.path.exists(place):
            raise ModelError(
                f"{what} {name_or_path!r}: no such folder (looked for {place}); give --model_name_or_path a folder or "
                "a hub id"
            )
        looked = f", neither from the folder {place}, which is not there, nor from the hub"
        hub.check_reachable()
    logging.disable_progress_bar()
    try:
        return auto_class.from_pretrained(name_or_path, trust_remote_code=False, **kwargs)
    except Exception as error:  # OSError, ValueError, safetensors' and huggingface_hub's own: all mean the same here
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        was_read = isinstance(error, ValueError | KeyError | ImportError) and not isinstance(error, OSError)
        if not looked or was_read:  # no hub would help
            raise ModelError(f"{what} {name_or_path!r} cannot be loaded: {reason}") from None
        raise ModelError(f"{what} {name_or_path!r} cannot be loaded{looked}: {reason} ({hub.advice()})") from None
    finally:
        logging.enable_progress_bar()


def base_path(name: str) -> str:
    """Where a base is loaded from: `mini` is this package's own, all else a folder or a hub id."""
    return str(BASE_DIR) if name == "mini" else name
