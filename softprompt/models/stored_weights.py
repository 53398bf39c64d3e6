"""Find out where a model's tensors are stored, without reading them; and whether files hold all that a model needs.

The names in the files may differ from those in the model, because transformers renames tensors while it loads them, and
merges some, such as the matrices of experts. The rules are transformers' own (`get_model_conversion_mapping`). A merged
tensor can be read in parts if its flattened values are those of the stored tensors, one after the other; any other
conversion is refused.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel

from softprompt.utils.errors import ModelError
from softprompt.utils.safetensors_io import ConcatenatedTensor, StoredTensor

Shape = tuple[int, ...]

# The last parts of the names under which bitsandbytes, GPTQ and AWQ store the scales of quantized weights.
QUANTIZATION_SCALES = r"\.(SCB|weight_format|absmax|nested_absmax|quant_map|quant_state[^/]*|qzeros|g_idx|scales)$"


def locate_tensors(
    base: PreTrainedModel, files: Mapping[str, StoredTensor], flag: str, names: Collection[str] | None = None
) -> dict[str, StoredTensor]:
    """Return where the tensors of `base.state_dict()` are stored, by their names in `base`. Names that the files lack
    are left out. Each tensor's `dtype` is set to the one in which transformers would load it.

    Args:
        base: A model; its tensors may be on the meta device.
        files: The stored tensors by their names in the files.
        flag: The flag that needs them, for error messages.
        names: Locate only the tensors of these names; None locates all.

    Raises:
        ModelError: A tensor is stored with another shape or kind of dtype than the model's, or in a form that cannot be
            read in parts.
    """
    expected = base.state_dict()
    dtypes = _dtypes_when_loaded(base, expected)
    located = {}
    for name, sources in _sources(base, files, expected).items():
        if names is not None and name not in names:
            continue
        for tensor in chain(*sources.tensors.values()):
            if tensor.file_dtype.is_floating_point != dtypes[name].is_floating_point:
                raise ModelError(
                    f"{tensor.file.name}: tensor {name} has the dtype {tensor.file_dtype}, but the model requires "
                    f"{dtypes[name]}; fetch the base's files again"
                )
            tensor.dtype = dtypes[name]
        located[name] = found = _concatenated(sources)
        if found is None:
            raise ModelError(
                f"{flag}: {base.name_or_path}: transformers converts {name} while it loads ({sources.rule}), so this "
                f"tensor cannot be read in parts; leave {flag} out, or load the base once with transformers and save "
                "it with save_pretrained(FOLDER, save_original_format=False)"
            )
        if found.shape != tuple(expected[name].shape):
            raise ModelError(
                f"{found.file.name}: tensor {name} has the shape {list(found.shape)}, but config.json requires "
                f"{list(expected[name].shape)}; fetch the base's files again"
            )
    return located


class _Sources(NamedTuple):
    """The stored tensors of one tensor of the model.

    Attributes:
        converter: transformers' WeightConverter for them; None for a single tensor that is only renamed.
        tensors: The stored tensors in transformers' order, by the pattern of the converter that their names match.
    """

    converter: Any
    tensors: dict[str | None, list[StoredTensor]]

    @property
    def rule(self) -> str:
        return str([type(each).__name__ for each in self.converter.operations] if self.converter else "several sources")


def _sources(
    base: PreTrainedModel, files: Mapping[str, StoredTensor], expected: Mapping[str, Tensor]
) -> dict[str, _Sources]:
    """Return the sources of each tensor of the model, collected as in transformers'
    `convert_and_load_state_dict_in_model`."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(base)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: dict[str, _Sources] = {}
    for stored in sorted(files, key=dot_natural_key):
        prefix = base.base_model_prefix
        name, pattern = rename_source_key(stored, renamings, converters, prefix, expected)
        if name not in expected and stored in expected:
            name, pattern = rename_source_key(stored, [], [], prefix, expected)
        if name in expected:
            sources = found.setdefault(name, _Sources(of_pattern.get(pattern), {}))
            sources.tensors.setdefault(pattern, []).append(files[stored])
    return found


def _concatenated(sources: _Sources) -> StoredTensor | None:
    """Return the tensor of the model that is made from `sources`; None if it is not a concatenation of them."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    converter, lists = sources.converter, list(sources.tensors.values())
    if converter is None:
        return lists[0][0] if sum(map(len, lists)) == 1 else None
    lists = [sources.tensors.get(pattern, []) for pattern in converter.source_patterns]
    done = [(type(each), getattr(each, "dim", None)) for each in converter.operations]
    stacked = done[:1] == [(MergeModulelist, 0)]
    uniform = all(len(each) == len(lists[0]) and len({t.shape for t in each}) == 1 for each in lists)
    if len(converter.target_patterns) > 1 or not uniform:
        return None
    shapes = [each[0].shape for each in lists]
    if done == [(MergeModulelist, 0)] and len(lists) == 1:
        return ConcatenatedTensor(lists[0], (len(lists[0]), *shapes[0]))
    if stacked and done[1:] == [(Concatenate, 1)] and _fit(shapes):
        parts = [tensor for of_one_index in zip(*lists, strict=True) for tensor in of_one_index]
        return ConcatenatedTensor(parts, (len(lists[0]), sum(shape[0] for shape in shapes), *shapes[0][1:]))
    if done == [(Concatenate, 0)] and len(lists[0]) == 1 and _fit(shapes):
        return ConcatenatedTensor([*chain(*lists)], (sum(shape[0] for shape in shapes), *shapes[0][1:]))
    return None


def _fit(shapes: Sequence[Shape]) -> bool:
    """Whether tensors of these shapes can be concatenated along their first dimension."""
    return all(shapes) and len({shape[1:] for shape in shapes}) == 1


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


def _dtypes_when_loaded(base: PreTrainedModel, expected: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """Return the dtype in which transformers loads each tensor: the model's, except that some parameters of some models
    are kept in fp32."""
    from transformers.core_model_loading import build_glob_alternation

    plan = base._get_dtype_plan(base.dtype)
    if not plan:
        return {name: tensor.dtype for name, tensor in expected.items()}
    pattern, by_group, _ = build_glob_alternation(list(plan))
    matches = {name: pattern.search(name) for name in expected}
    return {
        name: plan[by_group[match.lastgroup]] if (match := matches[name]) and match.lastgroup else tensor.dtype
        for name, tensor in expected.items()
    }


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
