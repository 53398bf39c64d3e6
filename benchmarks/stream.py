"""Compare `--stream_base` with an ordinary run: time of a step and memory, for windows of several sizes.

    python benchmarks/stream.py --size 1b4 --rows 32 --contestants streamed
    python benchmarks/stream.py --size 160m --rows 32 128 512

The base has random weights. It is written with one file per block into a folder that is removed at the end. The rows
are synthetic. Memory is the peak of the anonymous resident memory of the process (RssAnon of /proc/self/status),
sampled every 5 ms. It excludes the page cache, which the system can free at any time. `--cold` tells the system to drop
each part of a file from the page cache as soon as it has been read, so that every byte comes from the disk.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from arguments import ArgumentParser
from measure import clock
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BloomConfig

from softprompt.data.tokenization import Example
from softprompt.engines.bloom_schedule import MicrobatchMajor
from softprompt.engines.layer_major import LayerMajor
from softprompt.engines.microbatch_engine import MicrobatchEngine
from softprompt.models.bloom_weights import ResidentWeights
from softprompt.models.loading import freeze, load_base, move_to_device
from softprompt.models.meta_loading import load_meta_model
from softprompt.models.weight_offload import StreamedWeights
from softprompt.prompt.soft_prompt import PromptEmbedding

SIZES = {  # H, L, N, V
    "1b4": (2048, 24, 16, 46145),
    "160m": (1024, 12, 16, 8000),
    "mini": (128, 4, 4, 1000),
}
FP32, P = torch.float32, 10


def write_base(folder: Path, H: int, L: int, N: int, V: int, dtype: torch.dtype = FP32) -> None:
    """Write a random BLOOM: one file for each block, and one for all other tensors. The content of only one file is in
    memory at a time."""
    config = BloomConfig(vocab_size=V, hidden_size=H, n_layer=L, n_head=N, dtype=dtype)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
    shapes.pop("lm_head.weight")
    files: dict[str, list[str]] = {}
    for name in shapes:
        part = name.split(".")[2] if name.startswith("transformer.h.") else "rest"
        files.setdefault(f"model-{part}.safetensors", []).append(name)
    for seed, (file, names) in enumerate(files.items()):
        draw = torch.Generator().manual_seed(seed)
        tensors = {name: 0.02 * torch.randn(shapes[name], generator=draw) for name in names}
        tensors = {n: (t + 1 if "norm" in n and "weight" in n else t).to(dtype) for n, t in tensors.items()}
        save_file(tensors, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def synthetic(rows: int, mean: int, words: int) -> list[Example]:
    """Return random rows of 0.5 to 1.5 times `mean` tokens; two thirds of the tokens are targets."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(mean // 2, mean + mean // 2 + 1, (rows,), generator=draw).tolist()
    each = [torch.randint(4, words, (n,), generator=draw).tolist() for n in lengths]
    return [Example(ids, [-100] * (len(ids) // 3) + ids[len(ids) // 3 :]) for ids in each]


@contextmanager
def watched_memory() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the peak of the anonymous resident bytes since the context was entered."""
    peak, done = anonymous_bytes(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous_bytes())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield lambda: max(peak, anonymous_bytes())
    done.set()
    thread.join()


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


class ReadCounter:
    """Counts the bytes and seconds of os.preadv. If `cold`, it tells the system to drop these bytes from the page cache
    at once."""

    def __init__(self, cold: bool):
        self.bytes, self.seconds, real = 0, 0.0, os.preadv

        def preadv(descriptor: int, views: list[memoryview], offset: int) -> int:
            began = time.perf_counter()
            count = real(descriptor, views, offset)
            if cold:
                os.posix_fadvise(descriptor, offset, count, os.POSIX_FADV_DONTNEED)
            self.bytes, self.seconds = self.bytes + count, self.seconds + time.perf_counter() - began
            return count

        os.preadv = preadv


def engine_of(contestant: str, folder: Path, args: argparse.Namespace) -> MicrobatchEngine:
    if contestant != "streamed":
        weights = ResidentWeights(load_base(str(folder), args.device, FP32), FP32)
        return MicrobatchEngine(MicrobatchMajor(weights, contestant == "checkpointed"), args.tokens)
    base, blocks = load_meta_model(str(folder))
    streamed = StreamedWeights(move_to_device(freeze(base, FP32), args.device), blocks, FP32)
    schedule = LayerMajor(streamed, int(args.max_activation_gib * 2**30), Path(args.offload_folder))
    return MicrobatchEngine(schedule, args.tokens)


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--size", choices=SIZES, default="160m")
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--mean", type=int, default=57, help="tokens of a row")
    parser.add_argument("--contestants", nargs="+", default=["streamed", "resident"])
    parser.add_argument("--steps", type=int, default=1, help="measured steps of each window")
    parser.add_argument("--tokens", type=int, default=1024, help="maximum number of tokens of a micro-batch")
    parser.add_argument("--max_activation_gib", type=float, default=1.0)
    parser.add_argument(
        "--folder", default=tempfile.gettempdir(), help="where the base and the offloaded activations are written"
    )
    parser.add_argument("--base", help="folder of the base: use the one there, or write one there and keep it")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    parser.add_argument("--cold", action="store_true", help="read every byte from the disk, not from the page cache")
    args = parser.parse_args()
    args.offload_folder = args.folder
    H, L, N, V = SIZES[args.size]
    needed = 4 * (12 * L * H * H + V * H) * 1.01 + 2**30
    if shutil.disk_usage(args.folder).free < needed:
        parser.error(f"--folder {args.folder} has less than {needed / 2**30:.1f} GiB free")
    with tempfile.TemporaryDirectory(dir=args.folder) as made:
        base, load = Path(args.base or made), os.getloadavg()[0]
        if not list(base.glob("*.index.json")):
            write_base(base, H, L, N, V)
        size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
        print(f"{args.size}, fp32: {size / 2**30:.2f} GiB; {torch.get_num_threads()} threads, load {load:.1f}")
        print("| rows | contestant | s a step | tokens/s | GiB read a step | read at GB/s | RssAnon, GiB | loss |")
        print("|---|---|---|---|---|---|---|---|")
        for contestant in args.contestants:
            measure(contestant, base, V, H, args)


def measure(contestant: str, folder: Path, V: int, H: int, args: argparse.Namespace) -> None:
    with watched_memory() as memory:
        engine, reading = engine_of(contestant, folder, args), ReadCounter(args.cold)
        prompt = PromptEmbedding(torch.randn(P, H, generator=torch.Generator().manual_seed(0))).to(args.device)
        engine.accumulate(prompt, synthetic(2, 8, V), 1.0)  # warms up
        for rows in args.rows:
            window, seconds = synthetic(rows, args.mean, V), []
            reading.bytes, reading.seconds = 0, 0.0
            for _ in range(args.steps):
                began = clock(args.device)
                loss, targets = engine.accumulate(prompt, window, 1.0)
                seconds.append(clock(args.device) - began)
            step, tokens = statistics.median(seconds), sum(len(row.input_ids) for row in window)
            read = reading.bytes / args.steps / 2**30
            rate = reading.bytes / reading.seconds / 1e9 if reading.bytes else 0
            print(
                f"| {rows} | {contestant} | {step:.1f} | {tokens / step:.0f} | {read:.2f} | {rate:.2f} | "
                f"{memory() / 2**30:.2f} | {loss.item() / targets:.5f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
