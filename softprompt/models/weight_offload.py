"""Blocks that are read from their files whenever something passes through them: two in memory, the rest on the disk."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.models.bloom_weights import MODULES, BlockWeights, LinearParams, NonBlockWeights
from softprompt.utils.safetensors_io import StoredTensor


class StreamedWeights(NonBlockWeights):
    """All but the blocks in memory, and two buffers of a block each: a thread reads the next block into one of them
    while the other is computed with. What is in a buffer is not read again, so an order that turns round, there and
    back, finds the two blocks at each end in memory."""

    def __init__(self, base: PreTrainedModel, blocks: Mapping[str, StoredTensor], compute_dtype: torch.dtype):
        """base: a hollow one (see `hollow.MetaModel`), frozen."""
        super().__init__(base, compute_dtype)
        like = [p.detach() for m in MODULES for p in base.transformer.h[0].get_submodule(m).parameters()]
        stored = [
            [blocks[f"transformer.h.{i}.{module}.{name}"] for module in MODULES for name in LinearParams._fields]
            for i in range(self.shape.L)
        ]
        self._slots = [_Slot(like, stored, self.head.device) for _ in range(2)]
        self._reader = ThreadPoolExecutor(1, "blocks")
        self.own_bytes += sum(slot.own_bytes for slot in self._slots)

    def through(self, order: Sequence[int]) -> Iterator[BlockWeights]:
        """Raises TrainingError where a file cannot be read any more."""
        slot: _Slot | None = None
        for at, i in enumerate(order):
            slot = self._slot(i, slot)
            layer = slot.layer()
            for after in order[at + 1 : at + 2]:
                self._slot(after, slot)
            yield layer

    def _slot(self, i: int, busy: "_Slot | None") -> "_Slot":
        """The buffer that has block i or will have it; one that is busy is not given to another block."""
        for slot in self._slots:
            if slot.number == i:
                return slot
        slot = next(slot for slot in self._slots if slot is not busy)
        slot.begin(self._reader, i)
        return slot


class _Slot:
    """A buffer for a block's tensors: weights of linear layers in the compute dtype, all else fp32. On CUDA there are
    two, one of them in pinned memory, from which the reading thread copies."""

    def __init__(self, like: Sequence[Tensor], stored: Sequence[Sequence[StoredTensor]], device: torch.device):
        cuda = device.type == "cuda"
        self.number: int | None = None
        self.stored, self._reading = stored, Future[None]()
        self._reading.set_result(None)
        self.host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=cuda) for t in like]
        self.device = [torch.empty_like(t, device=device) for t in self.host] if cuda else self.host
        self.copying = torch.cuda.Stream(device) if cuda else None
        self.own_bytes = sum(t.nbytes for t in self.device)

    def begin(self, reader: ThreadPoolExecutor, i: int) -> None:
        """Let block i be read over what is here, which nothing that is computed from now on will use."""
        self._reading.exception()  # of a block that nobody came for, or that could not be read
        self.number = i
        used = torch.cuda.current_stream(self.copying.device).record_event() if self.copying else None
        self._reading = reader.submit(self._read, i, used)

    def layer(self) -> BlockWeights:
        """The block, once it is here."""
        try:
            self._reading.result()
        except BaseException:
            self.number = None
            raise
        return BlockWeights(*(LinearParams(*pair) for pair in zip(self.device[::2], self.device[1::2], strict=True)))

    def _read(self, i: int, used: torch.cuda.Event | None) -> None:
        for stored, target in zip(self.stored[i], self.host, strict=True):
            stored.read_into(target)
        if self.copying and used:
            self.copying.wait_event(used)
            with torch.cuda.stream(self.copying):
                for source, target in zip(self.host, self.device, strict=True):
                    target.copy_(source, non_blocking=True)
            self.copying.synchronize()
