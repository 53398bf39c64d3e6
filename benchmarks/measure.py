"""Measure time, matmul rate and peak memory, and count operations, in the same way for every contestant of a
benchmark. `python benchmarks/measure.py [--device cuda]` prints the machine and its rates.
"""

import contextlib
import ctypes
import gc
import os
import platform
import resource
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from arguments import ArgumentParser
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from softprompt.data.tokenization import IGNORE, Example

T = TypeVar("T")
EDGE = {"cpu": 2048, "cuda": 8192}  # size of the square matmul; on a GPU, launch overhead would dominate with 2048


def clock(device: torch.device) -> float:
    """Wait until the device has finished its work, and return the time in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def matmul_rate(dtype: torch.dtype, device: torch.device, repeats: int = 5) -> float:
    """Return the operations per second (two per multiply-add) of a square matmul: the median of `repeats`, after a
    warm-up."""
    edge = EDGE[device.type]
    a = torch.randn(edge, edge, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)
    return 2 * edge**3 / _median_seconds(lambda: a @ a, device, repeats)


def copy_rate(device: torch.device, repeats: int = 9) -> float:
    """Return the bytes per second, read and written, of copying 256 MiB."""
    source = torch.ones(1 << 26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median_seconds(lambda: target.copy_(source), device, repeats)


def call_seconds(device: torch.device) -> float:
    """Return the seconds that one call of a minimal torch operator takes from Python."""
    one, many = torch.ones(1, device=device), 1000
    return _median_seconds(lambda: [one + one for _ in range(many)], device, 9) / many


def _median_seconds(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Return the median duration of `repeats` calls of `run`, after a warm-up."""
    seconds = []
    for _ in range(repeats + 1):
        began = clock(device)
        run()
        seconds.append(clock(device) - began)
    return statistics.median(seconds[1:])


class Work(NamedTuple):
    """The sizes of a base that determine the cost of a token.

    Attributes:
        L: Number of layers.
        layer: Number of weights of a layer.
        q: Number of these weights that compute queries.
        kv: Number of these weights that compute keys and values.
        width: N · D, the number of values of a token's queries.
        H: Hidden size.
        V: Vocabulary size.
    """

    L: int
    layer: int
    q: int
    kv: int
    width: int
    H: int
    V: int


def work_of(config: Any) -> Work:
    """Return the sizes of a dense decoder whose layers all have the same sizes."""
    text = config.get_text_config(decoder=True)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
    L, N, H = text.num_hidden_layers, text.num_attention_heads, text.hidden_size
    D = getattr(text, "head_dim", None) or H // N
    K = getattr(text, "num_key_value_heads", None) or N
    layers = next(m for m in base.modules() if isinstance(m, nn.ModuleList) and len(m) == L)
    layer = sum(m.weight.numel() for m in layers[0].modules() if isinstance(m, nn.Linear | Conv1D))
    return Work(L, layer, H * N * D, 2 * H * K * D, N * D, H, text.vocab_size)


def needed_operations(work: Work, rows: Sequence[Example], P: int, windows: int) -> float:
    """Return the operations of the matrix products that are needed for the exact gradient of `windows` optimizer steps
    over `rows`, with P virtual tokens."""
    return sum(needed_parts(work, rows, P, windows))


def needed_parts(work: Work, rows: Sequence[Example], P: int, windows: int) -> tuple[float, float]:
    """Return the operations of `needed_operations` in two parts: products with weights, and products in attention.

    The count is the same for every contestant. Additional work is not counted: padding, running the prompt again for
    each row, logits at positions without a target, and recomputation that saves memory. A weight costs 2 operations
    per position.

    Let s = Σ(t − 1) be the number of text positions (the last of a row's t tokens predicts nothing), n the number of
    positions that predict a target, and W the number of windows, each with P virtual tokens.

    * Layers, forward: 2·layer·(L − 1)·(s + W·P) in all layers but the last. In the last layer 2·kv·(s + W·P) for keys
      and values, and 2·(layer − kv)·n for the rest.
    * Vocabulary, forward: 2·H·V·n.
    * Input gradients of both: the same again, minus 2·(q + kv)·s for the first layer's queries, keys and values of the
      text, because the text's embeddings get no gradient.
    * Attention, forward: 4·width per visible pair of query and key, for q·kᵀ and p·v. In each of the first L − 1
      layers, a row has Σ_{i<t−1}(P + i + 1) pairs and the prompts have W·P·(P + 1)/2. In the last layer, only the n
      positions have queries. Sliding windows, which hide some pairs, are ignored.
    * Attention, backward: 8·width per pair, for four products. In the first layer, the text's queries need only the
      gradients of the prompt's keys and values: 6·width for each of s·P pairs.
    """
    L, width = work.L, work.width
    text = sum(len(row.input_ids) - 1 for row in rows)  # s
    predictors = [at - 1 for row in rows for at, label in enumerate(row.labels) if at and label != IGNORE]
    n, prompt = len(predictors), windows * P
    layers = 2 * (work.layer * (L - 1) * (text + prompt) + work.kv * (text + prompt) + (work.layer - work.kv) * n)
    products = layers + 2 * work.H * work.V * n
    of_text = sum((len(row.input_ids) - 1) * (P + len(row.input_ids) / 2) for row in rows)  # pairs of a layer
    of_prompt = windows * P * (P + 1) / 2
    of_last = sum(P + i + 1 for i in predictors)
    pairs = (L - 1) * (of_text + of_prompt) + of_last
    pairs_backward = 8 * width * (pairs - of_text) + 6 * width * text * P
    return 2 * products - 2 * (work.q + work.kv) * text, 4 * width * pairs + pairs_backward


def limit_memory(share: float = 0.9) -> None:
    """Limit this process to the given share of the machine's available memory, so that a contestant that does not fit
    raises an error and is not killed by the kernel."""
    fields = _fields(Path("/proc/meminfo"))
    if "MemAvailable" in fields:
        most = int(share * fields["MemAvailable"]) + _fields(Path("/proc/self/status"))["VmData"]
        resource.setrlimit(resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error))


def peak_above(run: Callable[[], T], device: torch.device) -> tuple[T, int]:
    """Call `run`. Return its result, and by how many bytes the memory rose above its level before the call, at the
    peak: allocated memory on CUDA, else resident memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        return run(), torch.cuda.max_memory_allocated(device) - before
    give_back()
    before = resident("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the current value
    except OSError:
        result, peak = _sampled(run)
    else:
        result = run()
        peak = resident("VmHWM")
    return result, peak - before


def resident(field: str) -> int:
    """Return the bytes of resident memory of this process: `VmRSS` is the current value, `VmHWM` the peak."""
    return _fields(Path("/proc/self/status"))[field]


def _fields(path: Path) -> dict[str, int]:
    """Return the values of the lines `Name: 123 kB` of a file under /proc, in bytes; an empty dictionary if there is no
    such file."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return {name: int(rest.split()[0]) << 10 for name, _, rest in (x.partition(":") for x in lines) if "kB" in rest}


def give_back() -> None:
    """Return freed memory to the operating system. Otherwise the allocator would reuse it, and new allocations would
    not show in the resident memory."""
    with contextlib.suppress(OSError, AttributeError):  # without glibc, the measured peak is a lower bound
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _sampled(run: Callable[[], T]) -> tuple[T, int]:
    """Call `run`. Return its result and the peak of resident memory in bytes, sampled by a thread."""
    peak, done = resident("VmRSS"), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident("VmRSS"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        return run(), peak
    finally:
        done.set()
        watcher.join()


def machine(device: torch.device) -> dict[str, Any]:
    """Return the hardware and the library versions of a measurement."""
    import peft
    import transformers

    cpu = [x.partition(":")[2].strip() for x in _lines(Path("/proc/cpuinfo")) if x.startswith("model name")]
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else (cpu or [platform.machine()])[0],
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],  # of the last minute, before the measurement
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def main() -> None:
    parser = ArgumentParser("Print the machine and its measured rates.")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    device = parser.parse_args().device
    print("| what | measured |\n|---|---|")
    for name, value in machine(device).items():
        print(f"| {name} | {value} |")
    halves = (torch.bfloat16,) if device.type == "cpu" else (torch.bfloat16, torch.float16)  # CPUs have no fast fp16
    for dtype in (torch.float32, *halves):
        print(f"| matmul {str(dtype).removeprefix('torch.')} | {matmul_rate(dtype, device) / 1e12:,.2f} TFLOP/s |")
    print(f"| copy | {copy_rate(device) / 1e9:,.0f} GB/s, read and written |")
    print(f"| call of an operator | {1e6 * call_seconds(device):.1f} µs |")


if __name__ == "__main__":
    main()
