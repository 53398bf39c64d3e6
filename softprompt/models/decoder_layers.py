"""Find the layers of a decoder: the modules that its hidden states pass through one after the other."""

import re
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from softprompt.models.capabilities import OTHER_MODALITIES
from softprompt.utils.errors import ModelError
from softprompt.utils.model_config import layers_and_heads


class DecoderLayers(NamedTuple):
    """The layers of a base.

    Attributes:
        body: The module that owns the list of layers, and whose forward calls them.
        name: The name of this list in the base, such as `model.layers`.
        layers: The layers, in the order of the list.
    """

    body: PreTrainedModel
    name: str
    layers: list[Any]


def decoder_layers(base: PreTrainedModel, flag: str) -> DecoderLayers:
    """Find the layers of `base`: the only list of L modules that a transformers model within it owns, where L is the
    number of layers in its configuration. They share no parameters, so each can be sharded or offloaded by itself.

    Args:
        flag: The flag that needs the layers, for error messages.

    Raises:
        ModelError: There is no such list, or there are several; or two layers share a parameter, or have a parameter
            without dimensions, which `fully_shard` cannot split.
    """
    L, _ = layers_and_heads(base.config)
    found = [
        DecoderLayers(body, ".".join(filter(None, (path, name))), list(child))
        for path, body in base.named_modules()
        if isinstance(body, PreTrainedModel) and not re.search(OTHER_MODALITIES, path)
        for name, child in body.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == L
    ]
    kind = type(base).__name__
    if len(found) != 1:
        reason = f"has {len(found)} lists of {L} layers, not one"
    elif any(not p.dim() for layer in found[0].layers for p in layer.parameters()):
        reason = "has parameters without dimensions in its layers"
    elif _share_parameters(base, found[0]):
        reason = "has layers that share parameters"
    else:
        return found[0]
    raise ModelError(f"{flag}: {base.name_or_path}: {kind} {reason}; leave it out")


def _share_parameters(base: PreTrainedModel, found: DecoderLayers) -> bool:
    """Whether a parameter of a layer also belongs to another layer or to a module outside the layers."""
    own = [id(p) for layer in found.layers for p in layer.parameters()]
    others = (p for name, p in base.named_parameters(remove_duplicate=False) if not name.startswith(f"{found.name}."))
    return len(set(own)) < len(own) or not set(own).isdisjoint(map(id, others))
