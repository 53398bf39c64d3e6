"""Measure the memory, the time and the error of a base in 8 or 4 bits.

    python benchmarks/quantized.py [--model_name_or_path FOLDER]

For each form of the base and each engine, the script measures in a separate process:

* load s, load peak MiB: seconds to load the base, and the highest resident memory until then;
* base MiB: the bytes of the loaded base;
* step above MiB: by how much the memory rose above that in one step over --rows rows;
* step s: the median seconds of --steps steps;
* loss: the loss of these rows behind a prompt that consists of word embeddings;
* gradient off by: ‖g - g₀‖ / ‖g₀‖, where g is the gradient of the prompt, and g₀ that with the unquantized base and the
  same engine.

"bitsandbytes' forward" is the padded engine with the forward of bitsandbytes' own modules, as transformers leaves them;
some of its versions cannot compute a gradient on some CPUs.
The rows are held-out rows of mini:sentiment, or rows of --dataset.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from arguments import ArgumentParser
from cases import NAMES, Base
from contestants import SEED, quiet
from measure import give_back, peak_above, resident
from transformers import PreTrainedModel

from softprompt import mini
from softprompt.config.loader import train_config
from softprompt.data.dataset import load_rows
from softprompt.data.template import Template
from softprompt.data.tokenization import tokenize
from softprompt.engines.factory import make_engine
from softprompt.engines.memory_estimate import resident_bytes
from softprompt.models.bitsandbytes_linear import has_bitsandbytes_weight
from softprompt.models.loading import load_base, load_tokenizer, word_embeddings
from softprompt.models.precision import resolve_device
from softprompt.prompt.soft_prompt import PromptEmbedding


class Form(NamedTuple):
    """A base in `bits` bits (None: unquantized) with an engine; `theirs`: with bitsandbytes' own forward."""

    bits: int | None
    engine: str
    theirs: bool = False

    def __str__(self) -> str:
        stored = f"{self.bits} bit" if self.bits else "as it is"
        return f"{stored} | {'padded, bitsandbytes’ forward' if self.theirs else self.engine}"


FORMS = [
    *(Form(bits, engine) for engine in ("packed", "padded") for bits in (None, 8, 4)),
    *(Form(bits, "padded", theirs=True) for bits in (8, 4)),
]


def main() -> None:
    args, exact = parse(), {}
    print(f"{args.model_name_or_path}, {args.dtype}, {args.rows} rows, P = {args.num_virtual_tokens}\n")
    print("| base | engine | load s | load peak MiB | base MiB | step above MiB | step s | loss | gradient off by |")
    print("|---|---|---|---|---|---|---|---|---|")
    with folder_of(args.model_name_or_path) as folder:
        for form in FORMS:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:  # memory of its own
                try:
                    found = process.submit(measure_form, args, folder, form).result()
                except RuntimeError as error:
                    if not form.theirs:
                        raise
                    print(f"| {form} | fails: {str(error).splitlines()[0]} |", flush=True)
                    continue
            g0 = exact.setdefault(form.engine, found["gradient"])
            off = ((found["gradient"] - g0).norm() / g0.norm()).item()
            memory = f"{found['load peak'] / 2**20:,.0f} | {found['base'] / 2**20:,.0f} | {found['peak'] / 2**20:,.0f}"
            times = f"{found['load']:.1f} | {memory} | {found['step']:.2f}"
            print(f"| {form} | {times} | {found['loss']:.5f} | {off:.4f} |", flush=True)


def parse() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    bases = f"mini, a folder, or one with random weights: {', '.join(NAMES)}"
    parser.add_argument("--model_name_or_path", default="mini", help=bases)
    parser.add_argument("--dataset", help="rows as train.py takes them")
    parser.add_argument("--tokenizer", help="a folder with a tokenizer (default: the base's, else the mini base's)")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--num_virtual_tokens", type=int, default=10)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


@contextmanager
def folder_of(name: str) -> Iterator[str]:
    """Yield the folder of a base; random weights are written to a temporary one."""
    if folder := Base(name).folder:
        yield folder
        return
    with tempfile.TemporaryDirectory() as folder:
        with quiet():
            Base(name).load(torch.device("cpu"), torch.float32).save_pretrained(folder)
        yield folder


def measure_form(args: argparse.Namespace, folder: str, form: Form) -> dict[str, Any]:
    device, dtype = resolve_device(args.device), getattr(torch, args.dtype)
    own = Base(args.model_name_or_path).folder
    tokenizer = load_tokenizer(args.tokenizer or own or str(mini.BASE_DIR))
    rows = load_rows(args.dataset, Template(), {}) if args.dataset else mini.rows("sentiment", "eval")
    examples = tokenize(rows[: args.rows], tokenizer, Template(), 256).examples
    began = time.perf_counter()
    base = load_base(folder, device, dtype, form.bits)
    load, load_peak = time.perf_counter() - began, resident("VmHWM")
    if form.theirs:
        restore_forward(base)
    P, words = args.num_virtual_tokens, word_embeddings(base).weight.detach()
    with quiet():
        engine = make_engine(train_config("mini", engine=form.engine), base, tokenizer, dtype, P)
    draw = torch.Generator().manual_seed(SEED)
    prompt = PromptEmbedding(words[torch.randint(4, len(words), (P,), generator=draw)].clone())
    give_back()
    (loss, targets), peak = peak_above(lambda: engine.accumulate(prompt, examples, 1.0), device)
    gradient, seconds = prompt.weight.grad.cpu().clone(), []
    for _ in range(args.steps):
        began = time.perf_counter()
        engine.accumulate(prompt, examples, 1.0)[0].item()
        seconds.append(time.perf_counter() - began)
    return {
        **{"load": load, "load peak": load_peak, "base": resident_bytes(base), "peak": peak},
        **{"step": statistics.median(seconds), "loss": loss.item() / targets, "gradient": gradient},
    }


def restore_forward(base: PreTrainedModel) -> None:
    for module in base.modules():
        if has_bitsandbytes_weight(module):
            del module.forward


if __name__ == "__main__":
    main()
