"""`--shard_base`: a base that no rank holds as a whole. torch's `fully_shard` gives each rank a slice of every layer.

A layer is gathered from all ranks shortly before a pass needs it, and resharded afterwards. Gathering is a collective
operation, so all ranks must make the same passes in the same order, however many rows each of them has. Therefore a
rank announces each pass in an all-reduce before it starts. If another rank announces a pass that also goes backward,
that one is first, and this rank only takes part in gathering. A rank that has no work left joins the others' passes
until no rank announces another one; `torch.distributed.algorithms.Join` uses the same idea.

A pass goes through the layers forward, or forward and then at once backward: the ranks that make it cannot do
anything in between. Therefore a micro-batch contains its prompt (`engines.joint_schedule`).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt.distributed.process_group import World
from softprompt.models.bloom_weights import BlockWeights, NonBlockWeights, block_weights
from softprompt.models.decoder_layers import DecoderLayers, decoder_layers
from softprompt.utils.errors import ModelError, TrainingError
from softprompt.utils.safetensors_io import StoredTensor

gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the latter before torch 2.13


class ShardedLayers:
    """The sharded layers of a base, and the passes over them.

    In transformers' own forward, hooks of this class announce the pass and gather the layers; in the backward pass, the
    hooks of `fully_shard` gather them. Code that uses the layers' parameters directly calls `iter_layers`.
    """

    def __init__(self, found: DecoderLayers, world: World):
        """
        Args:
            found: The layers, after `fully_shard`.
        """
        self.layers, self.world = found.layers, world
        self._all_gather = _AllGather(world)
        self._current_pass: Iterator[Any] = iter(())
        self._calls_at_end = 0  # of `_all_gather`, when the current pass is complete
        found.body.register_forward_pre_hook(self._begin_forward)
        found.body.register_forward_hook(self._end_forward)
        for before, layer in zip([self.layers[0], *self.layers], self.layers, strict=False):
            layer.set_custom_all_gather(self._all_gather)
            # torch would derive the order from all forwards since the last backward, which may differ between ranks
            layer.set_modules_to_backward_prefetch([before])
            layer.register_forward_pre_hook(self._begin_layer, prepend=True)

    def iter_layers(self, order: Sequence[int]) -> Iterator[Any]:
        """Return an iterator over the layers in `order`, which is 0 … L-1, or 0 … L-1 followed by L-1 … 0. A layer
        stays gathered until the next one is requested."""
        self._begin_pass(len(order) // len(self.layers))
        self._current_pass = self._iter_gathered(order)
        return self._current_pass

    def join(self) -> None:
        """Take part in the passes of the ranks that still have work, until no rank has any. Every rank must call this
        after its own work."""
        self._begin_pass(0)

    def _begin_pass(self, directions: int) -> None:
        """Announce a pass: forward only (1), forward and backward (2), or none (0). Take part in the passes of other
        ranks that have a larger number, until all ranks that make a pass make the same kind."""
        self._finish_current_pass()
        L = len(self.layers)
        while (largest := self._announce(directions)) > directions:
            for _ in self._iter_gathered([*range(L), *reversed(range(L))][: largest * L]):
                pass
        self._calls_at_end = self._all_gather.calls + directions * L

    def _announce(self, directions: int) -> int:
        """Return the largest number that any rank announces."""
        mine = torch.tensor([directions > 0, directions > 1], dtype=torch.float64)
        return int((self.world.all_reduce(mine) > 0).sum())

    def _begin_forward(self, *_: object) -> None:
        self._begin_pass(2 if torch.is_grad_enabled() else 1)
        self._current_pass = self._iter_gathered(range(len(self.layers)))

    def _begin_layer(self, layer: nn.Module, *_: object) -> None:
        if next(self._current_pass, None) is not layer:
            raise ModelError(f"--shard_base: {type(layer).__name__} does not run once per pass in order; leave it out")

    def _end_forward(self, body: nn.Module, *_: object) -> None:
        if next(self._current_pass, None) is not None:
            raise ModelError(f"--shard_base: {type(body).__name__} does not run all of its layers; leave it out")

    def _iter_gathered(self, order: Sequence[int]) -> Iterator[Any]:
        """Yield gathered layers. While the caller uses a layer, the next one is gathered asynchronously."""
        for at, i in enumerate(order):
            self._gather(i)
            for following in order[at + 1 : at + 2]:
                self._gather(following, ahead=True)
            yield self.layers[i]
            self.layers[i].reshard()

    def _gather(self, i: int, ahead: bool = False) -> None:
        with torch.inference_mode(False), torch.no_grad():  # its buffers are also used in training
            self.world.collective(lambda: self.layers[i].unshard(async_op=ahead))

    def _finish_current_pass(self) -> None:
        """Complete a pass that this rank broke off, for example after an error, since the other ranks make it.

        Raises:
            TrainingError: It was broken off within the backward pass, which cannot be completed.
        """
        for _ in self._current_pass:
            pass
        missing = self._calls_at_end - self._all_gather.calls
        if missing == len(self.layers):  # all of the backward pass
            for _ in self._iter_gathered(range(missing)[::-1]):
                pass
        elif missing:
            raise TrainingError(
                f"rank {self.world.rank}: the backward pass through the sharded base broke off, probably for lack of "
                "memory; give a smaller --tokens_per_microbatch, or start more ranks"
            )


class ShardedWeights(NonBlockWeights):
    """`BloomWeights` whose blocks are sharded. A rank holds its slices of all blocks, the gathered block in use, and
    the next block."""

    def __init__(self, base: PreTrainedModel, shards: ShardedLayers, compute_dtype: torch.dtype):
        super().__init__(base, compute_dtype)
        self._shards = shards
        self.extra_bytes += 2 * sum(p.numel() * p.element_size() for p in shards.layers[0].parameters())

    def iter_layers(self, order: Sequence[int]) -> Iterator[BlockWeights]:
        """Yield the blocks of a forward pass, or of one followed by its backward pass; see `ShardedLayers.iter_layers`.

        Raises:
            TrainingError: A rank has been lost.
        """
        return map(block_weights, self._shards.iter_layers(order))


def shard_layers(base: PreTrainedModel, stored: Mapping[str, StoredTensor], world: World) -> ShardedLayers:
    """Shard the layers of a base among all ranks; each rank reads its own slices from the files, one tensor at a time.

    Every rank must call this; it does not wait for the other ranks.

    Args:
        base: A frozen base, on its device, with its layers' parameters on the meta device (see
            `meta_loading.MetaModel`). Its layers are sharded in place.
        stored: Where these parameters are stored, by their names in `base`.

    Raises:
        TrainingError: A file can no longer be read.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    found, device = decoder_layers(base, "--shard_base"), base.get_input_embeddings().weight.device
    mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)
    in_layers = {p for layer in found.layers for p in layer.parameters()}
    outside_layers = {p for p in found.body.parameters() if p not in in_layers}
    for i, layer in enumerate(found.layers):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        _allocate(layer, device)
        for name, parameter in layer.named_parameters():
            _read_slice(stored[f"{found.name}.{i}.{name}"], parameter.to_local(), world)
    fully_shard(found.body, mesh=mesh, ignored_params=outside_layers)
    return ShardedLayers(found, world)


def _allocate(layer: nn.Module, device: torch.device) -> None:
    """Allocate this rank's slices of a layer's parameters; keep the layer's buffers."""
    buffers = [(module, name, buffer) for module in layer.modules() for name, buffer in module._buffers.items()]
    layer.to_empty(device=device)
    for module, name, buffer in buffers:
        module._buffers[name] = buffer


@torch.no_grad()
def _read_slice(stored: StoredTensor, mine: Tensor, world: World) -> None:
    """Read this rank's rows of a stored tensor into `mine`; the first dimension is split as torch.chunk splits it."""
    rows, values = stored.shape[0], math.prod(stored.shape[1:])
    first = min(rows, world.rank * -(-rows // world.size)) * values
    read = torch.empty(mine.shape, dtype=mine.dtype)
    stored.read_into(read, first)
    mine.copy_(read)


class _AllGather:
    """torch's default all-gather, except that its calls are counted, and that an error in it is reported with the rank
    that was lost."""

    def __init__(self, world: World):
        self.world, self.calls = world, 0

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        self.calls += 1
        return self.world.collective(lambda: gather(output_tensor, input_tensor, group=group, async_op=async_op))
