"""Check a base's weights: that its files hold all that the model needs, in the form that its configuration promises,
and that all values are finite."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.nn import Parameter
from transformers import PreTrainedModel

from softprompt.utils.errors import ModelError

# The last parts of the names under which bitsandbytes, GPTQ, AWQ, FP8 and compressed-tensors store the scales of
# quantized weights.
QUANTIZATION_SCALES = (
    r"\.(SCB|weight_format|absmax|nested_absmax|quant_map|quant_state[^/]*|qzeros|g_idx|scales|weight_scales?(_inv)?)$"
)
FLOATS, OF_INDICES = ("F64", "F32", "F16", "BF16"), ("I64", "BOOL")  # dtypes of safetensors that no quantization uses
IN_FORWARD = ("bitnet", "fp_quant")  # methods that may store floats, and quantize them in each forward pass


def check_finite(base: PreTrainedModel, files: Sequence[Path]) -> None:
    """Check that no weight of a loaded base is NaN or infinite. This reads the weights once, on the device that holds
    them, and takes no memory. Weights on the meta device are skipped, as are those in 8 bits or fewer.

    Args:
        files: See `check_complete`.

    Raises:
        ModelError: Some are.
    """
    weights = {
        name: weight.detach()
        for name, weight in base.named_parameters()
        if type(weight) is Parameter and weight.itemsize > 1 and weight.is_floating_point()
    }
    weights = {name: weight for name, weight in weights.items() if weight.numel() and not weight.is_meta}
    extremes = [torch.stack(torch.aminmax(weight)).float() for weight in weights.values()]  # NaN if one value is
    finite = torch.stack(extremes).isfinite().all(1).tolist() if extremes else []
    if not all(finite):
        broken = list(weights)[finite.index(False)]
        raise ModelError(
            f"{_file_of(broken, files) or base.name_or_path}: tensor {broken} holds values that are NaN or infinite"
            f"{' in float16' if weights[broken].dtype == torch.float16 else ''}; fetch the base's files again, or give "
            "--model_name_or_path another base"
        )


def _file_of(tensor: str, files: Sequence[Path]) -> Path | None:
    """Return the safetensors file that holds a tensor of the model, where its name may begin in another way; None if it
    is not found."""
    for path in files:
        with suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
            names = list(file.keys())
            if any(f".{tensor}".endswith(f".{name}") or f".{name}".endswith(f".{tensor}") for name in names):
                return path
    return None


def check_quantized_tensors(files: Sequence[Path], method: str | None, name: str) -> None:
    """Check by the names and dtypes of the tensors in safetensors files that a base is stored quantized if its
    configuration says so, and that each quantized weight has scales. Without them, transformers would take its codes
    for values.

    Args:
        files: See `check_complete`. Other formats are skipped.
        method: The method by which the base is stored quantized, as its configuration says; None if it is not.
        name: The base's name, for the error message.

    Raises:
        ModelError: No tensor is quantized although the configuration says so, or a quantized weight has no scales.
    """
    dtypes = dict(_stored_dtypes(files))
    scaled = {_owner(tensor) for tensor in dtypes if re.search(r"(scale|absmax|SCB)[^.]*$", tensor)}
    plain = dtypes and not scaled and {*dtypes.values()} <= {*FLOATS, *OF_INDICES}
    if method and method not in IN_FORWARD and plain:
        raise ModelError(
            f"{name}: its config.json says that its weights are stored quantized ({method}), and none of them is; "
            "remove quantization_config from it, or give --model_name_or_path another base"
        )
    for tensor, dtype in dtypes.items():
        if tensor.endswith(".weight") and dtype not in FLOATS and _owner(tensor) not in scaled:
            raise ModelError(
                f"{name}: its files hold the quantized weight {tensor} ({dtype}) without its scales; fetch the base's "
                "files again, or give --model_name_or_path another one"
            )


def _stored_dtypes(files: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """Yield the name and safetensors' name of the dtype of each tensor in safetensors files; skip other files."""
    for path in files:
        with suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open cannot be iterated)
                yield name, file.get_slice(name).get_dtype()


def _owner(tensor: str) -> str:
    """Return the name of the module whose weight, or scales of a weight, a tensor holds."""
    return re.sub(r"(\.weight)?\.[^.]+$", "", tensor)


def check_complete(found: Mapping[str, Any], name: str, files: Sequence[Path]) -> None:
    """Check that the files hold every weight of the base in its shape, since transformers draws all others at random,
    and that they hold no scales of quantized weights that it left unused.

    Args:
        found: What `from_pretrained` returns with `output_loading_info` and `ignore_mismatched_sizes`.
        files: The files of the weights, one of which the message names.

    Raises:
        ModelError: Weights are missing or have other shapes, or scales are left over.
    """
    scales = sorted(key for key in found["unexpected_keys"] if re.search(QUANTIZATION_SCALES, key))
    if scales:
        raise ModelError(
            f"{name}: its files hold {scales[0]}, which belongs to quantized weights, but its config.json has no "
            "quantization_config that uses it; restore that, or give --model_name_or_path the unquantized base"
        )
    if mismatched := sorted(found["mismatched_keys"]):
        tensor, stored, expected = mismatched[0]
        raise ModelError(
            f"{_file_of(tensor, files) or name}: tensor {tensor} has the shape {list(stored)}, but config.json "
            f"requires {list(expected)}; fetch the base's files again, or restore its config.json"
        )
    if missing := sorted(found["missing_keys"]):
        others = f" and {len(missing) - 1} other tensors" if missing[1:] else ""
        raise ModelError(
            f"{name}: its files lack {missing[0]}{others}, which its config.json requires; download the whole base "
            "again, or give --model_name_or_path another one"
        )
