"""Load a base and its tokenizer from a folder or the hub; freeze the base and move it to its device.

`load_base` does all of this. Code that examines the base in between calls `read_base` and `freeze_on_device` itself.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from softprompt.mini import BASE_DIR
from softprompt.models.base_files import settings_on_disk, weight_files
from softprompt.models.bitsandbytes_linear import use_dequantized_weights
from softprompt.models.capabilities import check_supports_prompt
from softprompt.models.quantization import (
    bitsandbytes_config,
    check_gradient,
    check_loadable,
    check_not_stored_quantized,
    check_quantization_settings,
    dequantize_compressed,
    holds_quantized,
    is_quantized,
    stored_method,
    without_bars_of,
)
from softprompt.models.weight_checks import check_complete, check_finite, check_quantized_tensors
from softprompt.utils import hub
from softprompt.utils.errors import ModelError, first_line, loading_error
from softprompt.utils.model_config import text_config
from softprompt.utils.progress import bar_settings, shows_bars


def base_path(name: str) -> str:
    """Return the folder or hub id from which a base is loaded: for `mini`, a folder in this package, else the name."""
    return str(BASE_DIR) if name == "mini" else name


def load_tokenizer(name_or_path: str) -> Any:
    """Load the base's tokenizer. If it has no pad token, the end-of-sequence token is used for padding, which is
    masked.

    Raises:
        ModelError: The base or its tokenizer does not exist or cannot be loaded, or the tokenizer has no
            end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = _from_pretrained(AutoTokenizer, name_or_path, "tokenizer")
    except ModelError:
        load_config(name_or_path)  # if the base itself is missing or unsuitable, report that instead
        raise
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{name_or_path}: its tokenizer has no eos_token, so an answer would have no end; set one in "
            "tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(name_or_path: str) -> Any:
    """Load a base's configuration, and check that prompts can be learned for such a model.

    Raises:
        ModelError: The configuration does not exist or cannot be loaded, or see `check_config`.
    """
    from transformers import AutoConfig

    try:
        config = _from_pretrained(AutoConfig, name_or_path, "base model")
    except ModelError:
        check_quantization_settings(settings_on_disk(name_or_path), name_or_path)
        raise
    check_quantization_settings(settings_on_disk(name_or_path), name_or_path)
    check_config(config, name_or_path)
    return config


def check_config(config: Any, name_or_path: str) -> None:
    """Check that prompts can be learned for a model of this configuration.

    Raises:
        ModelError: It is not a causal language model of transformers, or its weights are stored quantized in a way
            that transformers cannot load here.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    named = f"{name_or_path}: a model of type {config.model_type}"
    wanted = "give --model_name_or_path a causal one (BLOOM, Llama, Qwen, …)"
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{named} has an encoder and a decoder, and prompts are learned for a decoder alone; {wanted}")
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise ModelError(f"{named} is an encoder, whose tokens attend to later tokens; {wanted}")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{named} is no causal language model of transformers; {wanted}")
    check_loadable(config, name_or_path)


def load_base(
    name_or_path: str, device: torch.device, compute_dtype: torch.dtype, bits: int | None = None
) -> PreTrainedModel:
    """Load a causal language model, freeze it, and move it to `device`.

    Args:
        bits: Quantize the linear layers to 8 or 4 bits; None loads them as they are stored.

    Raises:
        ModelError, ConfigError: See `read_base` and `freeze_on_device`.
    """
    return freeze_on_device(read_base(name_or_path, device, compute_dtype, bits), device, compute_dtype)


def read_base(
    name_or_path: str,
    device: torch.device | None = None,
    compute_dtype: torch.dtype = torch.float32,
    bits: int | None = None,
) -> PreTrainedModel:
    """Load a causal language model onto the CPU, its weights in the dtype of its files. A quantized one is loaded onto
    `device`.

    Args:
        device: The run's device, by default the CPU.
        bits: See `load_base`.

    Raises:
        ModelError: The base is unsuitable (see `load_config`, the checks of `weight_checks`, and
            `capabilities.check_supports_prompt`), or `bits` is given for a base that is stored quantized.
        ConfigError: `bits` is given, but bitsandbytes or accelerate is not installed.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(name_or_path)
    settings: dict[str, Any] = {"dtype": "auto"}
    if bits:
        check_not_stored_quantized(config, name_or_path, f"--load_in_{bits}bit")
        settings["quantization_config"] = bitsandbytes_config(bits, compute_dtype)
    if bits or stored_method(config):
        settings["device_map"] = {"": device or torch.device("cpu")}
    # `check_complete` reports in one line what does not fit; transformers would print a table.
    settings |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    check_quantized_tensors(weight_files(name_or_path), stored_method(config), name_or_path)
    with _only_errors(), without_bars_of(stored_method(config)):
        base, found = _from_pretrained(AutoModelForCausalLM, name_or_path, "base model", bars=shows_bars(), **settings)
    files = weight_files(name_or_path)  # those of a hub id may have been downloaded only now
    check_quantized_tensors(files, stored_method(config), name_or_path)
    check_complete(found, name_or_path, files)
    check_supports_prompt(base, name_or_path)
    dequantize_compressed(base)
    return cast(PreTrainedModel, base)


def word_embeddings(base: PreTrainedModel) -> nn.Embedding:
    """Return the base's input embedding module, weight [V, H]."""
    return cast(nn.Embedding, base.get_input_embeddings())


def freeze_on_device(base: PreTrainedModel, device: torch.device, compute_dtype: torch.dtype) -> PreTrainedModel:
    """Freeze `base` in place (see `freeze`) and move it to `device`, where a quantized base is already.

    Raises:
        ModelError: A weight is not finite, or the base is quantized, and no gradient passes through it.
    """
    freeze(base, compute_dtype)
    if not is_quantized(base):
        move_to_device(base, device)
    check_finite(base, weight_files(str(base.name_or_path)))
    if is_quantized(base):
        check_gradient(base, compute_dtype)
    return base


def freeze(base: PreTrainedModel, compute_dtype: torch.dtype) -> PreTrainedModel:
    """Freeze `base` in place, put it in eval mode, and set the dtypes of its parameters.

    Weight matrices are stored in `compute_dtype`, to which autocast would otherwise cast them at each use, with the
    same result. All other parameters (embeddings, norms, biases, a tied head) become fp32, whatever their dtype in the
    files. Modules with quantized weights keep all their parameters as they are; those of bitsandbytes compute with the
    dequantized weights from now on (see `bitsandbytes_linear`). See `use_soft_caps`, too.
    """
    base.requires_grad_(False).eval()
    use_soft_caps(base)
    use_dequantized_weights(base)
    matrices = {id(matrix) for module in base.modules() for matrix in _weight_matrices(module)}
    matrices.discard(id(word_embeddings(base).weight))
    kept = {id(p) for module in base.modules() if holds_quantized(module) for p in module.parameters(recurse=False)}
    for parameter in base.parameters():
        if id(parameter) not in kept:
            parameter.data = parameter.data.to(compute_dtype if id(parameter) in matrices else torch.float32)
    return base


def use_soft_caps(base: PreTrainedModel) -> None:
    """Let `base` compute its own attention with matrix products ("eager") instead of scaled_dot_product_attention if
    its scores have a soft cap (Gemma 2), which the latter does not compute. Some versions of transformers leave the
    cap out without a message."""
    config = text_config(base.config)
    if getattr(config, "attn_logit_softcapping", None) and config._attn_implementation == "sdpa":
        base.set_attn_implementation("eager")


def _weight_matrices(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield those of a module's own parameters that are used only in matrix products: the weights of linear layers
    [out, in], those of GPT-2's Conv1D [in, out], and the stacked weights of experts [experts, …, …]. The weights of
    routers are left out: they are small, and some models require them in fp32.

    transformers' grouped matrix product over experts ignores autocast and runs in the dtype of its weights, which
    therefore must be the compute dtype.
    """
    if isinstance(module, nn.Linear | Conv1D):
        yield module.weight
    elif not isinstance(module, nn.Embedding | nn.modules.conv._ConvNd):
        yield from (p for p in module.parameters(recurse=False) if p.dim() == 3 and min(p.shape[1:]) > 1)


def move_to_device(base: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Move `base` to a device in place; tensors on the meta device stay there."""
    for tensor in (*base.parameters(), *base.buffers()):
        if not tensor.is_meta:
            tensor.data = tensor.data.to(device)
    return base


@contextmanager
def _only_errors() -> Iterator[None]:
    """Inside the block, let transformers log errors alone."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _from_pretrained(auto_class: Any, name_or_path: str, what: str, bars: bool = False, **kwargs: Any) -> Any:
    """Call an Auto class's `from_pretrained` on a folder or a hub id.

    Args:
        what: What is loaded, for error messages.
        bars: Show the progress of downloading and loading.

    Raises:
        ModelError: It does not exist or cannot be loaded.
    """
    searched = ""
    if not os.path.isdir(name_or_path):
        folder = os.path.abspath(name_or_path)
        if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1 or os.path.exists(folder):
            raise ModelError(
                f"{what} {name_or_path!r}: no such folder (looked for {folder}); give --model_name_or_path a folder or "
                "a hub id"
            )
        searched = f", neither from the folder {folder}, which is not there, nor from the hub"
        hub.check_reachable()
    try:
        with _bars(bars):
            return auto_class.from_pretrained(name_or_path, trust_remote_code=False, **kwargs)
    except Exception as error:  # OSError, ValueError, and safetensors' and huggingface_hub's own errors
        was_read = isinstance(error, ValueError | KeyError | ImportError) and not isinstance(error, OSError)
        if not searched or was_read:  # the hub would not help
            raise loading_error(what, name_or_path, error) from None
        reason = first_line(error)
        raise ModelError(f"{what} {name_or_path!r} cannot be loaded{searched}: {reason} ({hub.advice()})") from None


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Inside the block, show or hide the bars of transformers and of the hub. Those of transformers look like ours."""
    from transformers.utils import logging

    def like_ours(factory: Any, args: Any, kwargs: Any) -> Any:
        return factory(*args, **{**kwargs, **bar_settings(), "desc": "loading the base"})

    hook = logging.set_tqdm_hook(like_ours)
    if shown:
        logging.enable_progress_bar()
    else:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_tqdm_hook(hook)
        logging.enable_progress_bar()
