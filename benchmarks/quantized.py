"""Measure the memory and the error of a base in 8 or 4 bits.

    python benchmarks/quantized.py [--model_name_or_path FOLDER]

For each form of the base, the script measures in a separate process:

* their bytes: the bytes of the blocks' linear layers in memory;
* resident MiB: the resident memory of the process after the base has been loaded;
* peak above MiB: by how much the memory rose above that in one step over --rows rows;
* loss: the loss of these rows behind a prompt that consists of word embeddings;
* gradient off by: ‖g - g₀‖ / ‖g₀‖, where g is the gradient of the prompt, and g₀ that with the unquantized base.

The rows are held-out rows of mini:sentiment, or rows of --dataset.
"""

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from cases import Base
from contestants import SEED, quiet
from measure import give_back, peak_above, resident

from softprompt import mini
from softprompt.config.loader import train_config
from softprompt.data.dataset import load_rows
from softprompt.data.template import Template
from softprompt.data.tokenization import tokenize
from softprompt.engines.factory import make_engine
from softprompt.models.bloom_weights import BLOCK_MODULES
from softprompt.models.loading import load_tokenizer, word_embeddings
from softprompt.models.precision import resolve_device
from softprompt.models.quantization import quantize_blocks
from softprompt.prompt.soft_prompt import PromptEmbedding

FORMS = {"as it is": None, "8 bit": 8, "4 bit": 4}


def main() -> None:
    args = parse()
    found = {}
    for form in FORMS:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:  # so that its memory is its own
            found[form] = process.submit(measure_form, args, form).result()
    print(f"{args.model_name_or_path}, {args.rows} rows, P = {args.num_virtual_tokens}\n")
    print(
        "| blocks | their bytes | resident MiB | peak above MiB | loss | gradient off by |\n|---|---|---|---|---|---|"
    )
    exact = found["as it is"]["gradient"]
    for form, one in found.items():
        off = ((one["gradient"] - exact).norm() / exact.norm()).item()
        memory = f"{one['bytes']:,} | {one['resident'] / 2**20:,.0f} | {one['peak'] / 2**20:,.0f}"
        print(f"| {form} | {memory} | {one['loss']:.5f} | {off:.4f} |")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model_name_or_path", default="mini", help="mini, 49m, 560m, 1b4 (random weights) or a folder"
    )
    parser.add_argument("--dataset", help="rows as train.py takes them")
    parser.add_argument("--tokenizer", help="a folder with a tokenizer (default: the base's, else the mini base's)")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--num_virtual_tokens", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def measure_form(args: argparse.Namespace, form: str) -> dict[str, Any]:
    device, base = resolve_device(args.device), Base(args.model_name_or_path)
    model = base.load(torch.device("cpu"), torch.float32)
    tokenizer = load_tokenizer(args.tokenizer or base.folder or str(mini.BASE_DIR))
    rows = load_rows(args.dataset, Template(), {}) if args.dataset else mini.rows("sentiment", "eval")
    examples = tokenize(rows[: args.rows], tokenizer, Template(), 256).examples
    linear = [
        block.get_submodule(name) for block in model.transformer.h for name in BLOCK_MODULES if "layernorm" not in name
    ]
    held, bits = sum(module.weight.nbytes for module in linear), FORMS[form]
    rounded = quantize_blocks(model, bits, device) if bits else None
    held = rounded.nbytes if rounded else held
    config = train_config("mini", engine="packed")
    model = model.to(device) if rounded is None else model
    words = word_embeddings(model).weight.detach()
    with quiet():
        engine = make_engine(config, model, tokenizer, torch.float32, args.num_virtual_tokens, rounded)
    draw = torch.Generator().manual_seed(SEED)
    prompt = PromptEmbedding(words[torch.randint(4, len(words), (args.num_virtual_tokens,), generator=draw)].clone())
    give_back()
    there = resident("VmRSS")
    (loss, targets), peak = peak_above(lambda: engine.accumulate(prompt, examples, 1.0), device)
    return {
        "bytes": held,
        "resident": there,
        "peak": peak,
        "loss": loss.item() / targets,
        "gradient": prompt.weight.grad.cpu(),
    }


if __name__ == "__main__":
    main()
