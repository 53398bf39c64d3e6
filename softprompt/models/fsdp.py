"""A base that no rank holds whole: torch's `fully_shard` over its blocks, each rank with a slice of every tensor.

A block is gathered from all ranks when something passes through it, and let go behind that. So all ranks must pass as
often and in the same order, however many rows each has: a rank tells the others of every pass before it makes it, and
one that has no work left follows the others' passes until nobody makes any more.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.distributed.process_group import World
from softprompt.models.bloom_weights import BlockWeights, NonBlockWeights, layer_of
from softprompt.utils.safetensors_io import StoredTensor

gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before torch 2.13


class Shards:
    """The blocks of a base, and the passes through them. They lie in `base` as torch's sharded modules, whose hooks
    gather a block around its own forward and backward; for who computes otherwise there is `through`."""

    def __init__(self, base: PreTrainedModel, world: World):
        self.blocks, self.world = list(base.transformer.h), world
        self._pass: Iterator[Any] = iter(())
        base.transformer.register_forward_pre_hook(self._before_forward)

    def through(self, order: Sequence[int]) -> Iterator[Any]:
        """The blocks 0 … L-1, or these and back again: each is whole until the next one is asked for."""
        self._finish()
        self._tell(len(order) // len(self.blocks))
        self._pass = self._gathered(order)
        return self._pass

    def rest(self) -> None:
        """Follow the passes of ranks that still have work, for as long as any has; every rank must end with this."""
        self._finish()
        L = len(self.blocks)
        while directions := self._tell(0):
            for _ in self._gathered([*range(L), *reversed(range(L))][: directions * L]):
                pass

    def _before_forward(self, *_: object) -> None:
        self._tell(2 if torch.is_grad_enabled() else 1)

    def _tell(self, directions: int) -> int:
        """Of a pass there (1), or there and back (2), or of none here (0); returns the same of any rank that makes one,
        and all who do make the same."""
        mine = torch.tensor([directions > 0, directions > 1], dtype=torch.float64)
        return int((self.world.all_reduce(mine) > 0).sum())

    def _gathered(self, order: Sequence[int]) -> Iterator[Any]:
        """The next block is on its way while one is computed with."""
        for at, i in enumerate(order):
            self._gather(i)
            for after in order[at + 1 : at + 2]:
                self._gather(after, ahead=True)
            yield self.blocks[i]
            self.blocks[i].reshard()

    def _gather(self, i: int, ahead: bool = False) -> None:
        with torch.inference_mode(False), torch.no_grad():  # its memory is used again, for training too
            self.world.collective(lambda: self.blocks[i].unshard(async_op=ahead))

    def _finish(self) -> None:
        """A pass that somebody broke off is made to its end: the others are on their way."""
        for _ in self._pass:
            pass


class ShardedWeights(NonBlockWeights):
    """All but the blocks in the memory of every rank, and of them its slices, the one in use, and the next."""

    def __init__(self, base: PreTrainedModel, shards: Shards, compute_dtype: torch.dtype):
        super().__init__(base, compute_dtype)
        self._shards = shards
        self.own_bytes += 2 * sum(p.numel() * p.element_size() for p in shards.blocks[0].parameters())

    def through(self, order: Sequence[int]) -> Iterator[BlockWeights]:
        """Raises TrainingError where a rank is gone."""
        return map(layer_of, self._shards.through(order))


def shard(base: PreTrainedModel, stored: Mapping[str, StoredTensor], world: World) -> Shards:
    """The blocks of a base on the meta device (see `MetaModel`), frozen and on its device, become this rank's slices of
    those in the files. No more than one slice of a tensor is read at a time. Every rank must call this; none waits.

    Raises:
        TrainingError: a file cannot be read any more.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    body, device = base.transformer, base.get_input_embeddings().weight.device
    mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)
    frame = {p for name, p in body.named_parameters() if not name.startswith("h.")}
    for i, block in enumerate(body.h):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
        block.set_custom_all_gather(_Gather(world))
        block.to_empty(device=device)
        for name, parameter in block.named_parameters():
            _read(stored[f"transformer.h.{i}.{name}"], parameter.to_local(), world)
    fully_shard(body, mesh=mesh, ignored_params=frame)
    for before, block in zip([body.h[0], *body.h], body.h, strict=False):
        # torch's own guess goes by all forwards since the last backward, and ranks may have made different ones
        block.set_modules_to_backward_prefetch([before])
    return Shards(base, world)


@torch.no_grad()
def _read(stored: StoredTensor, mine: Tensor, world: World) -> None:
    """This rank's rows of a stored tensor, cut along its first dimension as torch.chunk does."""
    rows, values = stored.shape[0], math.prod(stored.shape[1:])
    first = min(rows, world.rank * -(-rows // world.size)) * values
    read = torch.empty(mine.shape, dtype=mine.dtype)
    stored.read_into(read, first)
    mine.copy_(read)


class _Gather:
    """torch's default all-gather; one that breaks off says who is gone."""

    def __init__(self, world: World):
        self.world = world

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        return self.world.collective(lambda: gather(output_tensor, input_tensor, group=group, async_op=async_op))
