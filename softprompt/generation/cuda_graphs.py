"""CUDA graphs of decoding steps: the host launches a whole step at once, not each of its kernels.

With few active requests, a decoding step is short: launching its kernels one by one takes longer than running them. A
CUDA graph records the kernels of one step with all their sizes and addresses, and runs them again on new values. So
sizes are rounded up, and the inputs are copied to the addresses that the graph reads:

    slots    n is rounded up to a power of two, at most the number of slots of the cache; slots beyond n are free, and
             what a step writes there is overwritten when they are refilled
    width    the number of positions that attention reads is rounded up to a multiple of WIDTH; positions after the end
             of a row are masked, as always
"""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from softprompt.generation.kv_cache import KVCache
from softprompt.generation.packed_step import PackedStep
from softprompt.utils.out_of_memory import is_out_of_memory
from softprompt.utils.progress import say

Forward = Callable[[KVCache, PackedStep], Tensor]  # runs one step over a cache: logits [n, V]
WIDTH = 128
CAPTURE_AT = 4  # the default: a size is captured at its fourth step, since capturing takes as long as several steps


def capture(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Record what `run` does on the GPU; return a function that does it again and returns the same tensor, with new
    values. `run` is also called once before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


class DecodeGraphs:
    """A step's forward, with a CUDA graph for each size of steps that only decode. It serves one cache.

    Args:
        forward: Runs a step without a graph.
        capture_at: Capture the graph of a size at this step of the size, counted from 1.
        record: See `capture`.
    """

    def __init__(
        self,
        forward: Forward,
        capture_at: int = CAPTURE_AT,
        record: Callable[[Callable[[], Tensor]], Callable[[], Tensor]] = capture,
    ):
        self.forward, self.capture_at, self.record = forward, capture_at, record
        self.graphs: dict[tuple[int, int], tuple[PackedStep, Callable[[], Tensor]]] = {}
        self.seen = Counter[tuple[int, int]]()
        self.failed = False

    def __call__(self, cache: KVCache, step: PackedStep) -> Tensor:
        """Run a step and return the logits [n, V] of each slot's next token. The next call may overwrite them."""
        if step.prefills or self.failed:
            return self.forward(cache, step)
        size = rounded_size(cache, step)
        self.seen[size] += 1
        if size not in self.graphs and (self.seen[size] < self.capture_at or not self._capture(cache, step, size)):
            return self.forward(cache, step)
        inputs, replay = self.graphs[size]
        _copy(step, inputs)
        return replay()[: len(step.positions)]

    def _capture(self, cache: KVCache, step: PackedStep, size: tuple[int, int]) -> bool:
        """Capture the graph of a size; return whether that worked. Running `step` several times has the same effect as
        running it once."""
        inputs = PackedStep.empty(*size, step.device)
        _copy(step, inputs)
        try:
            self.graphs[size] = inputs, self.record(lambda: self.forward(cache, inputs))
        except RuntimeError as error:  # a base may do something that cannot be captured
            if is_out_of_memory(error):
                raise
            self.failed = True
            say(f"CUDA graphs are not used: this base's decoding cannot be captured ({error})")
        return not self.failed


def with_graphs(forward: Forward, device: torch.device, capture_at: int = CAPTURE_AT) -> Forward:
    """Return `forward` with CUDA graphs on CUDA, else unchanged. For `capture_at` see `DecodeGraphs`."""
    return DecodeGraphs(forward, capture_at) if device.type == "cuda" else forward


def rounded_size(cache: KVCache, step: PackedStep) -> tuple[int, int]:
    """Return the number of slots and the width of the graph that runs a step."""
    n = len(step.positions)
    slots = min(1 << (n - 1).bit_length(), len(cache.layers[0][0]))
    return slots, min(-(-step.width // WIDTH) * WIDTH, cache.width)


def _copy(step: PackedStep, inputs: PackedStep) -> None:
    """Copy a step's tokens and positions to the tensors that a graph reads."""
    for source, target in ((step.input_ids, inputs.input_ids), (step.positions, inputs.positions)):
        target[: len(source)].copy_(source)
        target[len(source) :].zero_()
