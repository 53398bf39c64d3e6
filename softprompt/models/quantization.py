"""Quantized bases: `--load_in_8bit` and `--load_in_4bit`, and checkpoints that are stored quantized.

The flags have their names and their meaning in transformers: its `BitsAndBytesConfig` quantizes the linear layers while
the base loads (int8, or NF4 in blocks of 64 with double quantization), except for the head. Embeddings, layer norms and
biases are not quantized.

A checkpoint that is stored quantized is loaded by transformers as it is, if the libraries of its method are installed.
A forward and a backward pass then show whether a gradient passes through it. Weights in bitsandbytes' formats, from
either source, are multiplied as in `bitsandbytes_linear`; those of all other methods by transformers' own modules.
"""

import copy
import io
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from softprompt.models.bitsandbytes_linear import import_functional
from softprompt.models.precision import autocast, resolve_device
from softprompt.utils.errors import ConfigError, ModelError, first_line
from softprompt.utils.out_of_memory import is_out_of_memory

PROBE_TOKENS = 3  # number of embeddings that `check_gradient` runs
COMPRESSED = "compressed-tensors"  # the method whose weights are dequantized after they are loaded
WAY_OUT = ", which --load_in_4bit quantizes while it loads"


def bitsandbytes_config(bits: int, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return transformers' configuration for `--load_in_8bit` and `--load_in_4bit`.

    Raises:
        ConfigError: bitsandbytes or accelerate is not installed.
    """
    check_bitsandbytes()
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def check_bitsandbytes() -> None:
    """Check that the libraries for `--load_in_8bit` and `--load_in_4bit` are installed.

    Raises:
        ConfigError: They are not.
    """
    try:
        import_functional()
        if find_spec("accelerate") is None:  # used by transformers
            raise ImportError
    except ImportError:
        raise ConfigError(
            "--load_in_8bit and --load_in_4bit need bitsandbytes and accelerate: pip install bitsandbytes accelerate "
            '(or pip install -e ".[quantized]")'
        ) from None


def stored_method(config: Any) -> str | None:
    """Return the method by which a checkpoint is stored quantized, as its configuration says; None if it is not."""
    for one in (config, config.get_text_config()):
        if given := getattr(one, "quantization_config", None):
            return _method(given)
    return None


def check_quantization_settings(settings: Mapping[str, Any], name: str) -> None:
    """Check the form of the settings of quantization in a config.json, for which transformers' own error names neither
    the file nor the setting.

    Raises:
        ModelError: They do not name a method, or have a name that transformers does not read.
    """
    of_text = settings.get("text_config")
    for part in (settings, of_text if isinstance(of_text, dict) else {}):
        given = part.get("quantization_config")
        if not (given is None or (isinstance(given, dict) and _names_method(given))):
            raise ModelError(
                f"{name}: quantization_config in its config.json is {given!r:.80}, expected an object of settings "
                "with a quant_method; correct it, remove it if the weights are not quantized, or fetch the base's "
                "files again"
            )
        if part.get("compression_config") is not None:
            raise ModelError(
                f"{name}: its config.json has a compression_config, a former name that transformers does not read; "
                "rename it quantization_config, or give --model_name_or_path the unquantized base"
            )


def _names_method(given: Mapping[str, Any]) -> bool:
    method, bits = given.get("quant_method"), given.get("load_in_8bit") or given.get("load_in_4bit")
    return bool(bits) if method in (None, "bitsandbytes") else isinstance(method, str) and bool(method)


def check_not_stored_quantized(config: Any, name: str, what: str) -> None:
    """Refuse a checkpoint that is stored quantized.

    Args:
        name: The base's name, for the error message.
        what: What needs unquantized weights, for the error message.

    Raises:
        ModelError: It is stored quantized.
    """
    if method := stored_method(config):
        advice = "leave it out, or give" if what.startswith("--") else "give"
        raise _error(name, method, f"{what} needs weights that are not; {advice}")


def check_loadable(config: Any, name: str) -> None:
    """Check that transformers knows the method by which a checkpoint is stored quantized, and that its libraries are
    installed. Do nothing if the checkpoint is not stored quantized.

    Raises:
        ModelError: Transformers cannot load it here.
    """
    from transformers.quantizers import AutoHfQuantizer

    if (method := stored_method(config)) is None:
        return
    given = getattr(config, "quantization_config", None) or getattr(config.get_text_config(), "quantization_config", {})
    try:
        if method == "bitsandbytes":
            import_functional()
        quantizer = AutoHfQuantizer.from_config(copy.deepcopy(given), pre_quantized=True)
        quantizer.validate_environment(device_map={"": str(resolve_device("auto"))})  # some compare it with "cpu"
    except Exception as error:  # each quantizer raises other errors
        reason = f"transformers cannot load them here: {first_line(error).rstrip('.')}; give"
        raise _error(name, method, reason, WAY_OUT) from None


def without_bars_of(method: str | None) -> AbstractContextManager[Any]:
    """Return a context in which a method's library prints no progress bars. compressed-tensors writes them to stderr
    even if it is no terminal; those of the other methods are transformers'."""
    return redirect_stderr(io.StringIO()) if method == COMPRESSED else nullcontext()


def dequantize_compressed(base: PreTrainedModel) -> None:
    """Dequantize the weights of a base that is stored by compressed-tensors, in place. Then `is_quantized` is False.

    By default compressed-tensors dequantizes them in the first forward pass, and quantizes activations, through which
    no gradient passes. Any other base is left unchanged.
    """
    quantizer: Any = getattr(base, "hf_quantizer", None)
    if quantizer is None or _method(quantizer.quantization_config) != COMPRESSED:
        return
    from compressed_tensors.quantization import QuantizationMetadata

    if quantizer.quantization_config.is_quantization_compressed:
        with without_bars_of(COMPRESSED):
            quantizer.compressor.decompress_model(base)
    for module in base.modules():
        QuantizationMetadata.clear_quantization(module)
    quantizer.remove_quantization_config(base)


def is_quantized(base: PreTrainedModel) -> bool:
    """Whether weights of `base` are held quantized. They are not if they were dequantized when they were loaded: by
    transformers, as FP8 and MXFP4 are without a GPU, or by `dequantize_compressed`."""
    return getattr(base, "hf_quantizer", None) is not None


def bits_when_loaded(base: PreTrainedModel) -> int | None:
    """Return the number of bits to which `--load_in_8bit` or `--load_in_4bit` quantized the weights of `base`; None if
    they are as they are stored."""
    quantizer: Any = getattr(base, "hf_quantizer", None)
    if quantizer is None or quantizer.pre_quantized:
        return None
    return 4 if quantizer.quantization_config.load_in_4bit else 8


def holds_quantized(module: nn.Module) -> bool:
    """Whether a module itself has a quantized parameter: of a tensor class of its own, of integers, or of floats
    narrower than 16 bits. Such a module's parameters, scales among them, must not be cast."""
    return any(type(p) is not nn.Parameter or _is_narrow(p) for p in module.parameters(recurse=False))


def check_gradient(base: PreTrainedModel, compute_dtype: torch.dtype) -> None:
    """Check on a few word embeddings that a gradient passes through a quantized base to its input embeddings, and
    through each of its quantized modules. Each module is checked because residual connections carry a gradient around a
    module that loses it.

    Raises:
        ModelError: The forward or the backward pass fails, a module loses the gradient, or the gradient is zero or not
            finite.
    """
    embed, lost = base.get_input_embeddings(), list[str]()
    hooks = [
        module.register_forward_hook(partial(_note_lost_gradient, lost, name))
        for name, module in base.named_modules()
        if not any(module.children()) and _has_narrow_tensor(module)
    ]
    try:
        with torch.enable_grad(), autocast(embed.weight.device, compute_dtype):
            ids = torch.arange(PROBE_TOKENS, device=embed.weight.device)[None] % len(embed.weight)
            leaf = embed(ids).detach().requires_grad_()  # [1, PROBE_TOKENS, H]
            logits = base(inputs_embeds=leaf, use_cache=False).logits  # [1, PROBE_TOKENS, V]
        logits[0, -1].float().log_softmax(-1)[0].backward()
        reason = f"none passes through {lost[0]}" if lost else _fault_of(leaf.grad)
    except Exception as error:  # each method's kernels raise other errors
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        reason = first_line(error)
    finally:
        for hook in hooks:
            hook.remove()
    if reason:
        quantizer: Any = base.hf_quantizer
        if not quantizer.pre_quantized:
            raise ModelError(
                f"{base.name_or_path}: no gradient passes through it when it is quantized: {reason}; leave out "
                "--load_in_8bit and --load_in_4bit"
            )
        method = _method(quantizer.quantization_config)
        reason = f"transformers computes no gradient with them here: {reason}; give"
        raise _error(str(base.name_or_path), method, reason, WAY_OUT)


def _has_narrow_tensor(module: nn.Module) -> bool:
    """Whether a module has a quantized parameter, or a buffer that may be one (GPTQ stores weights in buffers)."""
    return holds_quantized(module) or any(map(_is_narrow, module.buffers(recurse=False)))


def _is_narrow(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or tensor.itemsize < 2


def _note_lost_gradient(lost: list[str], name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    """A forward hook: append `name` to `lost` if the module's input has a gradient and its output has none."""
    has_gradient = any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
    if has_gradient and isinstance(output, Tensor) and not output.requires_grad:
        lost.append(name)


def _fault_of(gradient: Tensor | None) -> str | None:
    """Return what is wrong with the gradient of a loss at the last token, [1, PROBE_TOKENS, H]; None if it is right."""
    if gradient is None or not gradient.isfinite().all():
        return "it is not finite"
    return None if gradient[0, 0].any() else "it is zero at earlier tokens"


def check_not_quantized(base: PreTrainedModel) -> None:
    """Refuse a base that transformers holds quantized.

    Raises:
        ModelError: It is quantized.
    """
    if is_quantized(base):
        method = _method(base.hf_quantizer.quantization_config)  # type: ignore[union-attr]
        raise _error(str(base.name_or_path), method, "this command needs weights that are not; give")


def _method(quantization: Any) -> str:
    """Return the method that a quantization configuration names, a dictionary or an object of transformers."""
    given = quantization if isinstance(quantization, dict) else vars(quantization)
    method = given.get("quant_method")
    if method is None and (given.get("load_in_4bit") or given.get("load_in_8bit")):
        return "bitsandbytes"
    return str(getattr(method, "value", method) or "by an unknown method")


def _error(name: str, method: str, reason: str, way_out: str = "") -> ModelError:
    return ModelError(
        f"{name}: its weights are stored quantized ({method}), and {reason} --model_name_or_path the unquantized base"
        f"{way_out}"
    )
