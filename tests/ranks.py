"""What each rank of tests/test_distributed.py does under torchrun: train a few small cases, and leave what came out.

torchrun --nproc_per_node=2 tests/ranks.py FOLDER
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from conftest import make_bloom
from peers import random_examples
from safetensors.torch import save_file
from transformers import AutoTokenizer

from softprompt.config import TrainingArguments
from softprompt.distributed import joined
from softprompt.feed import Listed
from softprompt.mini import BASE_DIR
from softprompt.model import PaddedEngine, freeze
from softprompt.packed import PackedEngine
from softprompt.prompt import PromptEmbedding, random_init
from softprompt.shared import SharedEngine
from softprompt.trainer import train
from softprompt.weights import ResidentWeights

FP32, BF16 = torch.float32, torch.bfloat16
# engine, dtype, P, rows in all, rows of a step: each epoch's last step is short, and has fewer rows than ranks in two
CASES = {
    "packed": ("packed", FP32, 3, 21, 8),
    "padded": ("padded", FP32, 3, 21, 8),
    "one row at the end": ("packed", FP32, 1, 13, 6),
    "one row at the end, padded": ("padded", FP32, 2, 13, 6),
    "long prompt": ("packed", FP32, 100, 9, 9),
    "bf16": ("packed", BF16, 3, 21, 8),
}
STEPS = 14


class Losses:
    def __init__(self):
        self.steps = []

    def on_step(self, step):
        self.steps.append(asdict(step))

    def wants_to_stop(self):
        return False

    def on_log(self, metrics): ...
    def on_evaluate(self, step): ...
    def on_save(self, step, state): ...


def engine_of(kind, base, dtype):
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    return (
        PackedEngine(ResidentWeights(base, dtype), 60) if kind == "packed" else PaddedEngine(base, tokenizer, 2, dtype)
    )


def run(name, share=lambda engine: engine):
    """Steps, the prompt [P, H] after them, and of held-out rows the losses and their sum."""
    kind, dtype, P, n, rows_per_step = CASES[name]
    base = freeze(make_bloom(n_layer=2), dtype)
    rows, held_out = random_examples(n, 17, seed=5), random_examples(7, 30, seed=6)
    torch.manual_seed(0)
    prompt = PromptEmbedding(random_init(P)(base.get_input_embeddings().weight))
    engine, seen = share(engine_of(kind, base, dtype)), Losses()
    args = TrainingArguments(max_steps=STEPS, per_device_train_batch_size=rows_per_step, gradient_accumulation_steps=1)
    train(engine, prompt, Listed(rows, args), args, 1e-2, seen)
    values = prompt.weight.detach()
    (loss, targets), (bare, _) = engine.evaluate(values, held_out), engine.evaluate(None, held_out)
    each = engine.losses(values, held_out)
    return seen.steps, values, {"loss": loss.item(), "bare": bare.item(), "targets": targets, "each": each}


def main(folder):
    with joined() as world:
        for name in CASES:
            steps, values, held_out = run(name, lambda engine: SharedEngine(engine, world))
            alike = world.gather(values.tolist())
            assert all(one == alike[0] for one in alike), "the ranks' prompts differ"
            if world.is_main:
                save_file({"prompt": values}, folder / f"{name}.safetensors")
                (folder / f"{name}.json").write_text(json.dumps({"steps": steps, **held_out}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
