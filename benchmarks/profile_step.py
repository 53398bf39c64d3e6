"""Profile a step of the packed engine: the time of each part, compared with three lower bounds.

    python benchmarks/profile_step.py --size 49m --row_lengths 60 [--bf16]

The bounds of a part are the times that it would take for:

* matmul: the operations of the matrix products that the exact gradient needs (`measure.needed_parts`), at the measured
  rate of a square matmul in the same dtype;
* bytes: reading its arguments and writing its results, at the measured rate of a large copy. A part that takes less
  time than this had its data in the cache;
* calls: its calls of torch operators, at the measured time of the smallest call.
"""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from arguments import ArgumentParser
from cases import NAMES, Base, synthetic
from contestants import ROWS_PER_STEP, contestants, engine_of, quiet
from measure import call_seconds, copy_rate, matmul_rate, needed_parts, work_of
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from softprompt import mini
from softprompt.data.tokenization import Example
from softprompt.engines.base import Engine
from softprompt.models.loading import load_tokenizer
from softprompt.prompt.soft_prompt import PromptEmbedding, random_init

STEPS = 3
PARTS = {
    "matrix products": ("aten::mm", "aten::addmm"),
    "attention": (
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "GELU": ("aten::gelu", "aten::gelu_backward"),
    "softmax over the vocabulary": ("aten::exp_", "aten::sub_", "aten::amax", "aten::scatter_", "aten::gather"),
    "layer norms": ("aten::native_layer_norm", "aten::native_layer_norm_backward"),
    "copies and casts": (
        "aten::copy_",
        "aten::_to_copy",
        "aten::clone",
        "aten::cat",
        "aten::stack",
        "aten::embedding",
        "aten::index_select",
        "aten::index_add_",
        "aten::index_add",
        "aten::select_backward",
    ),
    "sums": ("aten::add", "aten::add_", "aten::sum", "aten::mul", "aten::mul_"),
}
REST = "all else: views, Python"
TABLES = ("aten::embedding", "aten::index_select", "aten::index")  # these read only the selected rows of an argument


class Counting(TorchDispatchMode):
    """Counts the calls of each operator, and the bytes that it must read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.bytes = Counter[str](), Counter[str]()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operator(*args, **(kwargs or {}))
        name = operator.overloadpacket._qualified_op_name
        self.calls[name] += 1
        if not operator.is_view:
            self.bytes[name] += sum(map(_stored, tree_leaves(2 * [out] if name in TABLES else (args, kwargs, out))))
        return out


def _stored(leaf: Any) -> int:
    """Return the bytes of a tensor; expanded dimensions, which repeat the same bytes, count once."""
    if not isinstance(leaf, Tensor):
        return 0
    there = [n for n, stride in zip(leaf.shape, leaf.stride(), strict=True) if stride]
    return leaf.itemsize * int(torch.tensor(there).prod()) if leaf.numel() else 0


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--size", choices=["mini", *NAMES], default="49m")
    parser.add_argument("--row_lengths", type=int, default=60, help="mean length of synthetic rows, in tokens")
    parser.add_argument("--num_virtual_tokens", type=int, default=10)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    contestant = contestants()["packed-bf16" if args.bf16 else "packed"]
    base, device = Base(args.size), torch.device("cpu")
    model, work = base.load(device, contestant.dtype), work_of(base.config())
    rows = synthetic(args.row_lengths, work.V).choose(1).plain
    prompt = PromptEmbedding(random_init(args.num_virtual_tokens)(torch.empty(1, work.H)))
    engine = engine_of(contestant, model, load_tokenizer(str(mini.BASE_DIR)), args.num_virtual_tokens)

    plain, step, spent = profiled(engine, prompt, rows)
    with Counting() as counted:
        engine.accumulate(prompt, rows, 1.0)
    rate, bandwidth, call = matmul_rate(contestant.dtype, device), copy_rate(device), call_seconds(device)
    products, attention = needed_parts(work, rows, args.num_virtual_tokens, 1)
    operations = {"matrix products": products, "attention": attention}
    named = {key for keys in PARTS.values() for key in keys}
    parts = {**PARTS, REST: tuple(key for key in counted.calls if key not in named)}
    seconds = {name: sum(spent.get(key, 0.0) for key in keys) for name, keys in PARTS.items()}
    seconds[REST] = step - sum(seconds.values())

    print(f"{args.size}, {contestant.name}, {ROWS_PER_STEP} rows, {sum(len(r.input_ids) for r in rows):,} tokens")
    print(
        f"a step takes {1e3 * plain:.0f} ms, {1e3 * step:.0f} under the profiler; {rate / 1e9:.0f} GFLOP/s, "
        f"{bandwidth / 1e9:.1f} GB/s, "
        f"{1e6 * call:.1f} µs a call\n"
    )
    print("| part | ms | share | matmul, ms | bytes, ms | calls, ms | calls |\n|---|---|---|---|---|---|---|")
    for name in sorted(parts, key=lambda part: -seconds[part]):
        calls, moved = (sum(of[key] for key in parts[name]) for of in (counted.calls, counted.bytes))
        floors = [operations.get(name, 0.0) / rate, moved / bandwidth, calls * call]
        cells = [f"{1e3 * s:.0f}" for s in (seconds[name], *floors)]
        print(f"| {name} | {cells[0]} | {seconds[name] / step:.0%} | {' | '.join(cells[1:])} | {calls:,} |")


def profiled(engine: Engine, prompt: PromptEmbedding, rows: Sequence[Example]) -> tuple[float, float, dict[str, float]]:
    """Return the seconds of a step, of a step under the profiler, and of each operator in the latter, without the
    operators that it calls."""

    def seconds() -> float:
        began = time.perf_counter()
        for _ in range(STEPS):
            engine.accumulate(prompt, rows, 1.0)
        return (time.perf_counter() - began) / STEPS

    engine.accumulate(prompt, rows, 1.0)
    plain = seconds()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step = seconds()
    return plain, step, {event.key: event.self_cpu_time_total / 1e6 / STEPS for event in profiler.key_averages()}


if __name__ == "__main__":
    with quiet():
        main()
