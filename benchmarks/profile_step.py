"""Where a step of the packed engine spends its time, part by part, beside the floor of its matrix products.

    python benchmarks/profile_step.py --size 49m --row_lengths 60 [--bf16]

The floor is the operations that the exact gradient needs (`measure.needed_operations`) at the measured rate of a square
matmul in the same dtype.
"""

import argparse
import time

import torch
from cases import SIZES, Base, synthetic
from contestants import ROWS_PER_STEP, contestants, engine_of, quiet
from measure import matmul_rate, needed_operations
from torch.profiler import ProfilerActivity, profile

from softprompt import mini
from softprompt.model import load_tokenizer
from softprompt.prompt import PromptEmbedding, random_init
from softprompt.weights import bloom_shape

STEPS = 3
PARTS = {
    "matrix products": ("aten::mm", "aten::addmm"),
    "attention, forward": ("aten::_scaled_dot_product_flash_attention_for_cpu",),
    "attention, backward": ("aten::_scaled_dot_product_flash_attention_for_cpu_backward",),
    "GELU": ("aten::gelu", "aten::gelu_backward"),
    "softmax over the vocabulary": ("aten::exp_", "aten::sub_", "aten::amax", "aten::scatter_", "aten::gather"),
    "layer norms": ("aten::native_layer_norm", "aten::native_layer_norm_backward"),
    "copies and casts": ("aten::copy_", "aten::cat", "aten::stack", "aten::index_select", "aten::index_add_"),
    "sums": ("aten::add", "aten::add_", "aten::sum", "aten::mul", "aten::mul_"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["mini", *SIZES], default="49m")
    parser.add_argument("--row_lengths", type=int, default=60, help="mean length of synthetic rows, in tokens")
    parser.add_argument("--num_virtual_tokens", type=int, default=10)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    contestant = contestants()["packed-bf16" if args.bf16 else "packed"]
    base, device = Base(args.size), torch.device("cpu")
    model, shape = base.load(device, contestant.dtype), bloom_shape(base.config())
    rows = synthetic(args.row_lengths, shape.V).choose(1).plain
    prompt = PromptEmbedding(random_init(args.num_virtual_tokens)(torch.empty(1, shape.H)))
    engine = engine_of(contestant, model, load_tokenizer(str(mini.BASE_DIR)), args.num_virtual_tokens)

    engine.accumulate(prompt, rows, 1.0)
    began = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(STEPS):
            engine.accumulate(prompt, rows, 1.0)
    step = (time.perf_counter() - began) / STEPS
    spent = {event.key: event.self_cpu_time_total / 1e6 / STEPS for event in profiler.key_averages()}
    parts = {name: sum(spent.get(key, 0.0) for key in keys) for name, keys in PARTS.items()}
    parts["all else: launches, Python"] = step - sum(parts.values())
    floor = needed_operations(shape, rows, args.num_virtual_tokens, 1) / matmul_rate(contestant.dtype, device)
    print(f"{args.size}, {contestant.name}, {ROWS_PER_STEP} rows, {sum(len(r.input_ids) for r in rows):,} tokens")
    print(f"a step takes {1e3 * step:.0f} ms under the profiler; its matrix products need {1e3 * floor:.0f} ms\n")
    print("| part | ms | share |\n|---|---|---|")
    for name, seconds in sorted(parts.items(), key=lambda part: -part[1]):
        print(f"| {name} | {1e3 * seconds:.0f} | {seconds / step:.0%} |")


if __name__ == "__main__":
    with quiet():
        main()
