"""Clock, matmul rate, work count and peak memory: what `train.py` measures with, the same for every contestant."""

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
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from softprompt.data.tokenization import IGNORE, Example

T = TypeVar("T")
EDGE = {"cpu": 2048, "cuda": 8192}  # of the square matmul; a GPU does 2048 before the launch overhead is forgotten


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def matmul_rate(dtype: torch.dtype, device: torch.device, repeats: int = 5) -> float:
    """Operations a second (two per multiply-add) of a square matmul; the median of several after one that warms up."""
    edge = EDGE[device.type]
    a = torch.randn(edge, edge, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)
    return 2 * edge**3 / _median_seconds(lambda: a @ a, device, repeats)


def copy_rate(device: torch.device, repeats: int = 9) -> float:
    """Bytes a second, read and written ones, of copying 256 MiB."""
    source = torch.ones(1 << 26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median_seconds(lambda: target.copy_(source), device, repeats)


def call_seconds(device: torch.device) -> float:
    """Of the smallest operator that makes a tensor, from Python."""
    one, many = torch.ones(1, device=device), 1000
    return _median_seconds(lambda: [one + one for _ in range(many)], device, 9) / many


def _median_seconds(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Of several, after one that warms up."""
    seconds = []
    for _ in range(repeats + 1):
        began = clock(device)
        run()
        seconds.append(clock(device) - began)
    return statistics.median(seconds[1:])


class Work(NamedTuple):
    """What a token costs in a base: L layers of `layer` weights each, of which `q` make the queries and `kv` the keys
    and values; queries of `width` = N · D; hidden size H and vocabulary V."""

    L: int
    layer: int
    q: int
    kv: int
    width: int
    H: int
    V: int


def work_of(config: Any) -> Work:
    """Of a dense decoder, all of whose layers have the same sizes."""
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
    """Operations of the matrix products that the exact gradient of `windows` optimizer steps over `rows` needs."""
    return sum(needed_parts(work, rows, P, windows))


def needed_parts(work: Work, rows: Sequence[Example], P: int, windows: int) -> tuple[float, float]:
    """These operations of the products with weights, and of those in attention.

    The same for every contestant: whatever else one computes (padding, the prompt anew for each row, logits that no
    loss is taken at, a forward repeated to save memory) is not counted. A weight costs 2 operations a position.

    With s = Σ(t − 1) text positions, as a row's last of t tokens predicts nothing; n positions that predict a target;
    W windows of P virtual tokens each:

    * layers, forward: 2·layer·(L − 1)·(s + W·P) + last layer: keys and values 2·kv·(s + W·P), all else
      2·(layer − kv)·n;
    * vocabulary, forward: 2·H·V·n;
    * input gradients of both: the same again, less the first layer's queries, keys and values of the text, behind
      which is nothing to train: 2·(q + kv)·s;
    * attention, forward: q·kᵀ and p·v, 4·width a visible pair (query, key); text of a row Σ_{i<t−1}(P + i + 1) pairs,
      the prompt W·P·(P + 1)/2, in L − 1 layers; in the last the queries at the n positions only. Sliding windows, which
      hide some pairs, are left out;
    * attention, backward: four products, 8·width a pair; in the first layer the text's queries only ask for gradients
      at the prompt's keys and values: 6·width for each of s·P pairs.
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
    """Let this process allocate that share of what the machine has left, so that a contestant which does not fit ends
    with an error of its own and not with the machine's."""
    fields = _fields(Path("/proc/meminfo"))
    if "MemAvailable" in fields:
        most = int(share * fields["MemAvailable"]) + _fields(Path("/proc/self/status"))["VmData"]
        resource.setrlimit(resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error))


def peak_above(run: Callable[[], T], device: torch.device) -> tuple[T, int]:
    """What `run` returns, and by how many bytes memory rose meanwhile at most: allocated on CUDA, else resident."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        return run(), torch.cuda.max_memory_allocated(device) - before
    give_back()
    before = resident("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to now
    except OSError:
        result, peak = _sampled(run)
    else:
        result = run()
        peak = resident("VmHWM")
    return result, peak - before


def resident(field: str) -> int:
    """Bytes of `VmRSS` (now) or `VmHWM` (at most) of this process."""
    return _fields(Path("/proc/self/status"))[field]


def _fields(path: Path) -> dict[str, int]:
    """The lines `Name: 123 kB` of a file under /proc, in bytes; none where there is no such file."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return {name: int(rest.split()[0]) << 10 for name, _, rest in (x.partition(":") for x in lines) if "kB" in rest}


def give_back() -> None:
    """Freed memory that the allocator still holds would hide what is allocated next."""
    with contextlib.suppress(OSError, AttributeError):  # without glibc the figure is a lower bound
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _sampled(run: Callable[[], T]) -> tuple[T, int]:
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
    """Where and with what it ran."""
    import peft
    import transformers

    cpu = [x.partition(":")[2].strip() for x in _lines(Path("/proc/cpuinfo")) if x.startswith("model name")]
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else (cpu or [platform.machine()])[0],
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],  # of the last minute, before it began
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []
