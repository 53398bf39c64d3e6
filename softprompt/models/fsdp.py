"""`--shard_base`: a BLOOM that no rank holds as a whole. torch's `fully_shard` gives each rank a slice of every block.

A block is gathered from all ranks shortly before a pass needs it, and resharded afterwards. Gathering is a collective
operation, so all ranks must make the same passes in the same order, however many rows each of them has. Therefore a
rank announces each pass in an all-reduce before it starts. A rank that has no work left joins the others' passes until
no rank announces another one; `torch.distributed.algorithms.Join` uses the same idea.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.distributed.process_group import World
from softprompt.models.bloom_weights import BlockWeights, NonBlockWeights, block_weights
from softprompt.utils.safetensors_io import StoredTensor

gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the latter before torch 2.13


class ShardedBlocks:
    """The sharded blocks of a base, and the passes over them.

    In transformers' own forward, the hooks of `fully_shard` gather the blocks, and a hook of this class announces the
    pass. Code that uses the blocks' parameters directly calls `iter_blocks`.
    """

    def __init__(self, base: PreTrainedModel, world: World):
        self.blocks, self.world = list(base.transformer.h), world
        self._current_pass: Iterator[Any] = iter(())
        base.transformer.register_forward_pre_hook(self._announce_forward)

    def iter_blocks(self, order: Sequence[int]) -> Iterator[Any]:
        """Return an iterator over the blocks in `order`, which is 0 … L-1, or 0 … L-1 followed by L-1 … 0. A block
        stays gathered until the next one is requested."""
        self._finish_current_pass()
        self._announce(len(order) // len(self.blocks))
        self._current_pass = self._iter_gathered(order)
        return self._current_pass

    def join(self) -> None:
        """Take part in the passes of the ranks that still have work, until no rank has any. Every rank must call this
        after its own work."""
        self._finish_current_pass()
        L = len(self.blocks)
        while directions := self._announce(0):
            for _ in self._iter_gathered([*range(L), *reversed(range(L))][: directions * L]):
                pass

    def _announce_forward(self, *_: object) -> None:
        self._announce(2 if torch.is_grad_enabled() else 1)

    def _announce(self, directions: int) -> int:
        """Announce a pass: forward only (1), forward and backward (2), or none (0). Return the largest number that any
        rank announced. All ranks that make a pass announce the same number."""
        mine = torch.tensor([directions > 0, directions > 1], dtype=torch.float64)
        return int((self.world.all_reduce(mine) > 0).sum())

    def _iter_gathered(self, order: Sequence[int]) -> Iterator[Any]:
        """Yield gathered blocks. While the caller uses a block, the next one is gathered asynchronously."""
        for at, i in enumerate(order):
            self._gather(i)
            for following in order[at + 1 : at + 2]:
                self._gather(following, ahead=True)
            yield self.blocks[i]
            self.blocks[i].reshard()

    def _gather(self, i: int, ahead: bool = False) -> None:
        with torch.inference_mode(False), torch.no_grad():  # its buffers are also used in training
            self.world.collective(lambda: self.blocks[i].unshard(async_op=ahead))

    def _finish_current_pass(self) -> None:
        """Complete a pass that the caller did not finish, for example after an error, since the other ranks make it."""
        for _ in self._current_pass:
            pass


class ShardedWeights(NonBlockWeights):
    """`BloomWeights` whose blocks are sharded. A rank holds its slices of all blocks, the gathered block in use, and
    the next block."""

    def __init__(self, base: PreTrainedModel, shards: ShardedBlocks, compute_dtype: torch.dtype):
        super().__init__(base, compute_dtype)
        self._shards = shards
        self.extra_bytes += 2 * sum(p.numel() * p.element_size() for p in shards.blocks[0].parameters())

    def iter_layers(self, order: Sequence[int]) -> Iterator[BlockWeights]:
        """Yield the blocks of a forward pass, or of one followed by its backward pass; see `ShardedBlocks.iter_blocks`.

        Raises:
            TrainingError: A rank has been lost.
        """
        return map(block_weights, self._shards.iter_blocks(order))


def shard_blocks(base: PreTrainedModel, stored: Mapping[str, StoredTensor], world: World) -> ShardedBlocks:
    """Shard the blocks of a base among all ranks; each rank reads its own slices from the files, one tensor at a time.

    Every rank must call this; it does not wait for the other ranks.

    Args:
        base: A frozen BLOOM, on its device, with its blocks on the meta device (see `meta_loading.MetaModel`). Its
            blocks are sharded in place.
        stored: Where the blocks' tensors are stored, by their names in `base`.

    Raises:
        TrainingError: A file can no longer be read.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    body, device = base.transformer, base.get_input_embeddings().weight.device
    mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)
    outside_blocks = {p for name, p in body.named_parameters() if not name.startswith("h.")}
    for i, block in enumerate(body.h):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
        block.set_custom_all_gather(_AllGather(world))
        block.to_empty(device=device)
        for name, parameter in block.named_parameters():
            _read_slice(stored[f"transformer.h.{i}.{name}"], parameter.to_local(), world)
    fully_shard(body, mesh=mesh, ignored_params=outside_blocks)
    for before, block in zip([body.h[0], *body.h], body.h, strict=False):
        # torch would derive the order from all forwards since the last backward, and ranks may have made different ones
        block.set_modules_to_backward_prefetch([before])
    return ShardedBlocks(base, world)


@torch.no_grad()
def _read_slice(stored: StoredTensor, mine: Tensor, world: World) -> None:
    """Read this rank's rows of a stored tensor into `mine`; the first dimension is split as torch.chunk splits it."""
    rows, values = stored.shape[0], math.prod(stored.shape[1:])
    first = min(rows, world.rank * -(-rows // world.size)) * values
    read = torch.empty(mine.shape, dtype=mine.dtype)
    stored.read_into(read, first)
    mine.copy_(read)


class _AllGather:
    """torch's default all-gather, except that an error in it is reported with the rank that was lost."""

    def __init__(self, world: World):
        self.world = world

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        return self.world.collective(lambda: gather(output_tensor, input_tensor, group=group, async_op=async_op))
