"""Speed of generation beside PEFT and transformers in one run: `python benchmarks/generate.py`.

    python benchmarks/generate.py --size 49m
    python benchmarks/generate.py --model_name_or_path FOLDER
    python benchmarks/generate.py --size 1b4 --cases plain --batch_sizes 1 --new_tokens 16 --rounds 1

Prompts of P virtual tokens and texts are random. Answers are greedy and have given lengths (no end token is taken), so
that all contestants do the same work. Cases:

* `plain`: B texts of T tokens, one adapter, answers of --new_tokens;
* `mixed`: 64 texts of 4 to 200 tokens with answers of 8 to --new_tokens, both drawn uniformly on a logarithmic scale,
  one adapter, 32 at a time;
* `adapters`: 32 texts of 16 tokens, four for each of eight adapters; all 32 at a time if the contestant can mix them;
* `mixed_adapters`: the same with texts and answers as in `mixed`;
* `first`: one text of 16 tokens behind P = 100, one new token: the time to the first token. Contestants that cache the
  keys and values of prompts have them already.

Contestants:

* `peft`: PEFT's generate with all adapters loaded and set_adapter between batches. It runs without a KV cache (peft
  0.21.2 fails with one on transformers 5.24), so each step runs the whole row again, and it only has to write
  --new_tokens_of_peft tokens. Its steps become slower with the length of the answer, so its result is flattering.
* `transformers`: what PEFT would be with a working cache: transformers' own generate on embeddings of prompt and text.
* `packed`: this project's generator.

They take turns for --rounds rounds, in reverse order in every other round, after a short warm-up each. Results are
medians over the rounds: tokens asked for / seconds, prefill included. Ratios are between results of the same round.
"share of limit" is the time that memory bandwidth alone would need, over the time taken: the bytes of weights, keys and
values that the decode steps must read (one read of the weights per step of B tokens), divided by the rate at which a
1 GiB tensor is summed just before.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from answering import CONTESTANTS, Contestant, Question
from arguments import ArgumentParser
from cases import NAMES, Base
from contestants import SEED, quiet
from measure import Work, clock, machine, work_of

from softprompt import mini
from softprompt.models.loading import load_tokenizer
from softprompt.models.precision import resolve_device

CASES = ["plain", "mixed", "adapters", "mixed_adapters", "first"]
BATCH_SIZE, ADAPTERS, LONG_PROMPT = 32, 8, 100


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    device = resolve_device(args.device)
    print(json.dumps(machine(device)), file=sys.stderr)
    bases = [Base(name) for name in (args.model_name_or_path or args.size)]
    results = []
    for base in bases:
        work, dtype = work_of(base.config()), torch.bfloat16 if args.bf16 else torch.float32
        model = base.load(device, dtype).eval()
        tokenizer = load_tokenizer(args.tokenizer or base.folder or str(mini.BASE_DIR))
        model.generation_config.eos_token_id = None
        for name, P, questions, batch_size in cases(args, work.V):
            torch.manual_seed(SEED)
            prompts = [torch.randn(P, work.H, device=device) for _ in range(1 + max(q.adapter for q in questions))]
            contestants = {side: CONTESTANTS[side](model, tokenizer, prompts) for side in args.sides}
            found = compete(contestants, questions, batch_size, args, work, P, dtype)
            title = f"{Path(base.name).name}, P = {P}, {name}"
            results.append({"case": title, "sides": found})
            print(table(title, found), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": machine(device), "cases": results}, indent=1))


def parse() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--size", nargs="+", choices=NAMES, default=["49m"])
    parser.add_argument("--model_name_or_path", nargs="+", help="folders of bases, or mini; overrides --size")
    parser.add_argument("--tokenizer", help="folder of a tokenizer (default: the base's own, else the mini base's)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--sides", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt_tokens", type=int, nargs="+", default=[16, 200])
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--new_tokens_of_peft", type=int, default=4)
    parser.add_argument("--num_virtual_tokens", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--bf16", action="store_true", help="load the linear layers in bf16, for all contestants (default: fp32)"
    )
    parser.add_argument("--json", help="write all measurements to this file")
    return parser.parse_args()


def cases(args: argparse.Namespace, V: int) -> list[tuple[str, int, list[Question], int]]:
    """Make the cases: title, number of virtual tokens, questions, batch size."""
    draw = torch.Generator().manual_seed(SEED)
    P, new, made = args.num_virtual_tokens, args.new_tokens, []

    def text(length: int) -> list[int]:
        return torch.randint(4, V, (length,), generator=draw).tolist()

    def between(low: int, high: int) -> int:
        return round(low * (high / low) ** torch.rand((), generator=draw).item())

    def mixed(adapter: int) -> Question:
        return Question(text(between(4, 200)), adapter, between(min(8, new), new))

    if "plain" in args.cases:
        for T in args.prompt_tokens:
            for B in args.batch_sizes:
                made.append((f"{B} × {T} tokens → {new}", P, [Question(text(T), 0, new) for _ in range(B)], B))
    if "mixed" in args.cases:
        some = [mixed(0) for _ in range(2 * BATCH_SIZE)]
        made.append((f"{len(some)} texts of 4 … 200 tokens → 8 … {new}, {BATCH_SIZE} at a time", P, some, BATCH_SIZE))
    if "adapters" in args.cases:
        some = [Question(text(16), i % ADAPTERS, new) for i in range(BATCH_SIZE)]
        made.append((f"{BATCH_SIZE} × 16 tokens → {new}, {ADAPTERS} adapters", P, some, BATCH_SIZE))
    if "mixed_adapters" in args.cases:
        some = [mixed(i % ADAPTERS) for i in range(BATCH_SIZE)]
        made.append((f"{BATCH_SIZE} texts of 4 … 200 tokens → 8 … {new}, {ADAPTERS} adapters", P, some, BATCH_SIZE))
    if "first" in args.cases:
        made.append(("1 × 16 tokens → 1 (first token)", LONG_PROMPT, [Question(text(16), 0, 1)], 1))
    return made


def compete(
    contestants: dict[str, Contestant],
    questions: Sequence[Question],
    batch_size: int,
    args: argparse.Namespace,
    work: Work,
    P: int,
    dtype: torch.dtype,
) -> dict[str, dict[str, Any]]:
    """Time each contestant in each round: seconds, tokens per second, and share of the limit."""
    device = next(iter(contestants.values())).device
    asked = {name: _questions_for(name, questions, args.new_tokens_of_peft) for name in contestants}
    for name, contestant in contestants.items():
        contestant.time([q._replace(new_tokens=min(2, q.new_tokens)) for q in asked[name]], batch_size)
    found: dict[str, dict[str, Any]] = {n: {"tokens_per_second": [], "share": [], "seconds": []} for n in contestants}
    for number in range(args.rounds):
        for name in list(contestants) if number % 2 == 0 else reversed(contestants):
            rate = bandwidth(device)
            timing = contestants[name].time(asked[name], batch_size)
            found[name]["tokens_per_second"].append(timing.tokens / timing.seconds)
            found[name]["seconds"].append(timing.seconds)
            least_bytes = needed_bytes(work, asked[name], P, batch_size, dtype)
            found[name]["share"].append(least_bytes / timing.seconds / rate)
            print(f"{name}: {timing.tokens / timing.seconds:,.1f} tokens/s", file=sys.stderr, flush=True)
    return found


def _questions_for(side: str, questions: Sequence[Question], of_peft: int) -> list[Question]:
    if side != "peft":
        return list(questions)
    return [q._replace(new_tokens=min(q.new_tokens, of_peft)) for q in questions]


def needed_bytes(work: Work, questions: Sequence[Question], P: int, batch_size: int, dtype: torch.dtype) -> float:
    """Return the bytes that decoding has to read: the weights of the linear layers and the head once per step of
    `batch_size` tokens, and for every token the keys and values (fp32 on the CPU) of all positions before it."""
    steps = max(math.ceil(sum(q.new_tokens for q in questions) / batch_size), max(q.new_tokens for q in questions))
    weights = dtype.itemsize * (work.L * work.layer + work.V * work.H)
    positions = sum(n * (P + len(q.ids)) + n * (n - 1) / 2 for q in questions for n in (q.new_tokens,))
    return steps * weights + 4 * work.L * (work.kv // work.H) * positions


def bandwidth(device: torch.device) -> float:
    """Measure the bytes per second that are read from memory: the median of five sums over 1 GiB."""
    tensor, seconds = torch.ones(1 << 28, device=device), []
    for _ in range(5):
        start = clock(device)
        tensor.sum()
        seconds.append(clock(device) - start)
    return tensor.nbytes / statistics.median(seconds)


def table(title: str, found: dict[str, dict[str, Any]]) -> str:
    """Format a case as a Markdown table: each contestant's medians, and its ratios to the others in the same round."""
    others = [name for name in found if name != "packed"]
    head = ["contestant", "tokens/s", "slowest … fastest", "ms", *(f"× {name}" for name in others), "share of limit"]
    lines = [f"\n**{title}**\n", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, result in found.items():
        speeds = result["tokens_per_second"]
        of_others = [found[other]["tokens_per_second"] for other in others]
        ratios = [statistics.median(a / b for a, b in zip(speeds, of, strict=True)) for of in of_others]
        cells = [
            f"{statistics.median(speeds):,.1f}",
            f"{min(speeds):,.1f} … {max(speeds):,.1f}",
            f"{1000 * statistics.median(result['seconds']):,.0f}",
            *(f"{ratio:.2f}" for ratio in ratios),
            f"{statistics.median(result['share']):.0%}",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    with quiet():
        main()
