"""`--stream_base`: a BLOOM whose blocks stay in their files and are read, one at a time, whenever a pass needs them."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.models.bloom_weights import BLOCK_MODULES, BlockWeights, LinearParams, NonBlockWeights, is_bloom
from softprompt.models.loading import load_config
from softprompt.models.meta_loading import MetaModel, load_meta_model
from softprompt.utils.errors import ModelError
from softprompt.utils.safetensors_io import StoredTensor


def load_streamed(name_or_path: str) -> MetaModel:
    """Load a BLOOM without its blocks.

    Raises:
        ModelError: The base is not a BLOOM, or see `load_meta_model`.
    """
    config = load_config(name_or_path)
    if not is_bloom(config):
        sliced = " with slow_but_exact" if config.model_type == "bloom" else ""
        raise ModelError(
            f"--stream_base is for BLOOM, and {name_or_path} is of type {config.model_type}{sliced}; leave it out"
        )
    return load_meta_model(name_or_path, "--stream_base")


class StreamedWeights(NonBlockWeights):
    """`BloomWeights` with two block buffers: while the block in one buffer is used, a thread reads the next block into
    the other.

    A block that a buffer still holds is not read again. So a forward pass followed by a backward pass reads the last
    two blocks only once, and afterwards the first two blocks are in memory for the next window.
    """

    def __init__(self, base: PreTrainedModel, blocks: Mapping[str, StoredTensor], compute_dtype: torch.dtype):
        """
        Args:
            base: A frozen BLOOM with its blocks on the meta device (see `meta_loading.MetaModel`).
            blocks: Where the blocks' tensors are stored, by their names in `base`.
        """
        super().__init__(base, compute_dtype)
        like = [p.detach() for m in BLOCK_MODULES for p in base.transformer.h[0].get_submodule(m).parameters()]
        stored = [
            [blocks[f"transformer.h.{i}.{module}.{name}"] for module in BLOCK_MODULES for name in LinearParams._fields]
            for i in range(self.shape.L)
        ]
        self._buffers = [_BlockBuffer(like, stored, self.head.device) for _ in range(2)]
        self._reader = ThreadPoolExecutor(1, "blocks")
        self.extra_bytes += sum(buffer.num_bytes for buffer in self._buffers)

    def iter_layers(self, order: Sequence[int]) -> Iterator[BlockWeights]:
        """Yield the blocks with these indices; see `BloomWeights.iter_layers`.

        Raises:
            TrainingError: A file can no longer be read.
        """
        buffer: _BlockBuffer | None = None
        for at, i in enumerate(order):
            buffer = self._buffer_for(i, buffer)
            block = buffer.wait()
            for following in order[at + 1 : at + 2]:
                self._buffer_for(following, buffer)
            yield block

    def _buffer_for(self, i: int, in_use: "_BlockBuffer | None") -> "_BlockBuffer":
        """Return the buffer that holds or is reading block i; otherwise start reading it into the buffer not in use."""
        for buffer in self._buffers:
            if buffer.index == i:
                return buffer
        buffer = next(buffer for buffer in self._buffers if buffer is not in_use)
        buffer.start_reading(self._reader, i)
        return buffer


class _BlockBuffer:
    """Memory for one block's tensors: weights of linear layers in the compute dtype, all others in fp32. On CUDA there
    is a second copy in pinned host memory, from which the reading thread copies to the device."""

    def __init__(self, like: Sequence[Tensor], stored: Sequence[Sequence[StoredTensor]], device: torch.device):
        cuda = device.type == "cuda"
        self.index: int | None = None
        self.stored, self._reading = stored, Future[None]()
        self._reading.set_result(None)
        self.host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=cuda) for t in like]
        self.device = [torch.empty_like(t, device=device) for t in self.host] if cuda else self.host
        self.copy_stream = torch.cuda.Stream(device) if cuda else None
        self.num_bytes = sum(t.nbytes for t in self.device)

    def start_reading(self, reader: ThreadPoolExecutor, i: int) -> None:
        """Start reading block i into this buffer. Operations that are queued on the device may still use the block that
        the buffer holds now; the copy to the device waits for them."""
        self._reading.exception()  # wait for an earlier read, whose block may not have been requested; ignore its error
        self.index = i
        last_use = torch.cuda.current_stream(self.copy_stream.device).record_event() if self.copy_stream else None
        self._reading = reader.submit(self._read, i, last_use)

    def wait(self) -> BlockWeights:
        """Wait until the block has been read, and return it."""
        try:
            self._reading.result()
        except BaseException:
            self.index = None
            raise
        return BlockWeights(*(LinearParams(*pair) for pair in zip(self.device[::2], self.device[1::2], strict=True)))

    def _read(self, i: int, last_use: torch.cuda.Event | None) -> None:
        for stored, target in zip(self.stored[i], self.host, strict=True):
            stored.read_into(target)
        if self.copy_stream and last_use:
            self.copy_stream.wait_event(last_use)
            with torch.cuda.stream(self.copy_stream):
                for source, target in zip(self.host, self.device, strict=True):
                    target.copy_(source, non_blocking=True)
            self.copy_stream.synchronize()
