"""Find out where a model's tensors are stored, without reading them.

The names in the files may differ from those in the model, because transformers renames tensors while it loads them, and
merges some, such as the matrices of experts. The rules are transformers' own (`get_model_conversion_mapping`). A merged
tensor can be read in parts if its flattened values are those of the stored tensors, one after the other; any other
conversion is refused.
"""

from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.utils.errors import ModelError
from softprompt.utils.safetensors_io import ConcatenatedTensor, StoredTensor

Shape = tuple[int, ...]


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
