"""What each rank of tests/distributed/test_process_group.py does: train a few small cases, and write the results."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from helpers.bases import make_bloom
from helpers.peers import random_examples
from helpers.small_bases import small_base
from safetensors.torch import save_file
from transformers import AutoTokenizer

from softprompt.config.train_args import TrainingArguments
from softprompt.data.dataloader import ListLoader
from softprompt.distributed.process_group import process_group
from softprompt.engines.bloom_schedule import MicrobatchMajor
from softprompt.engines.data_parallel import DataParallelEngine
from softprompt.engines.factory import packed_engine, padded_engine
from softprompt.engines.layer_major import LayerMajor
from softprompt.engines.microbatch_engine import MicrobatchEngine
from softprompt.generation.generator import DataParallelGenerator, in_request_order, make_generator
from softprompt.generation.requests import GenerationSettings, Request
from softprompt.mini import BASE_DIR
from softprompt.models.bloom_weights import ResidentWeights
from softprompt.models.fsdp import ShardedWeights, shard_layers
from softprompt.models.loading import freeze
from softprompt.models.meta_loading import load_meta_model
from softprompt.prompt.reparameterization import MLPEncoder, ReparameterizedPrompt
from softprompt.prompt.soft_prompt import PromptEmbedding, random_init
from softprompt.training.loop import train

FP32, BF16 = torch.float32, torch.bfloat16
# engine, dtype, P, rows in all, rows of a step: each epoch's last step is short, and has fewer rows than ranks in two
CASES = {
    "packed": ("packed", FP32, 3, 21, 8),
    "padded": ("padded", FP32, 3, 21, 8),
    "one row at the end": ("packed", FP32, 1, 13, 6),
    "one row at the end, padded": ("padded", FP32, 2, 13, 6),
    "long prompt": ("packed", FP32, 100, 9, 9),
    "bf16": ("packed", BF16, 3, 21, 8),
    "mlp": ("packed", FP32, 3, 21, 8),
    "mlp, padded": ("padded", FP32, 3, 21, 8),
    "sharded": ("packed", FP32, 3, 21, 8),
    "sharded, padded": ("padded", FP32, 3, 21, 8),
    "sharded, one row at the end": ("packed", FP32, 1, 13, 6),
    "sharded, one row at the end, padded": ("padded", FP32, 2, 13, 6),
    "sharded, one rank out of memory": ("packed", FP32, 3, 21, 8),
    "sharded, bf16": ("packed", BF16, 3, 9, 9),
    "sharded, bf16, padded": ("padded", BF16, 3, 9, 9),
    "sharded gpt2": ("packed", FP32, 3, 21, 8),
    "sharded gpt2, padded": ("padded", FP32, 3, 21, 8),
    "sharded llama": ("packed", FP32, 3, 21, 8),
    "sharded llama, recomputed": ("packed", FP32, 3, 9, 9),
    "sharded llama, recomputed, padded": ("padded", FP32, 3, 9, 9),
    "sharded llama, one row at the end": ("packed", FP32, 1, 13, 6),
    "sharded llama, one rank out of memory": ("packed", FP32, 3, 21, 8),
    "sharded gemma3_text, padded": ("padded", FP32, 3, 21, 8),
    "sharded gemma3_text, bf16": ("packed", BF16, 3, 9, 9),
    "sharded mixtral": ("packed", FP32, 3, 9, 9),
    "sharded mixtral, one row at the end, padded": ("padded", FP32, 2, 13, 6),
}
ODD = {
    "gpt2": {"n_layer": 3},
    "llama": {"num_hidden_layers": 3, "intermediate_size": 63},
    "gemma3_text": {"num_hidden_layers": 2, "intermediate_size": 63},
    "mixtral": {"num_hidden_layers": 3, "num_local_experts": 3},
}
STEPS = 6  # two epochs of the cases with 21 rows


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


def base_of(name):
    """Odd sizes, so that no rank's slice is as large as another's."""
    if kind := next((kind for kind in ODD if f"sharded {kind}" in name), None):
        return small_base(kind, **ODD[kind])
    return make_bloom(33, 3, 3) if "sharded" in name else make_bloom(n_layer=2)


def shared_out(name, world, folder):
    """The base of a case in files, and this rank's share of it."""
    if world.is_main:
        base_of(name).save_pretrained(folder, max_shard_size="60KB")
    world.all_gather("it is written")
    base, stored = load_meta_model(str(folder), "--shard_base")
    base = freeze(base, CASES[name][1])
    shards = shard_layers(base, stored, world)
    parameters = [p for layer in shards.layers for p in layer.parameters()]
    held = sum(p.to_local().numel() for p in parameters)
    assert held < 0.7 * sum(p.numel() for p in parameters), "this rank holds too much"
    world.all_gather("it is read")
    return base, shards


def short_of_memory(weights):
    """There is no memory for more than 25 tokens, from the first micro-batch on that has more."""
    plenty = weights.embed

    def embed(ids):
        if len(ids) > 25:
            raise torch.OutOfMemoryError("CUDA out of memory (as a test has it)")
        return plenty(ids)

    weights.embed = embed


def short_of_memory_within(layer):
    """The same, of a base's own forward, which then breaks off in this layer."""

    def refuse(module, inputs):
        if inputs[0].shape[1] > 25:
            raise torch.OutOfMemoryError("CUDA out of memory (as a test has it)")

    layer.mlp.register_forward_pre_hook(refuse)


def prompt_of(name, start):
    """The prompt that begins at `start` [P, H]; in the cases with such a name, reparameterized."""
    if name.startswith("mlp"):
        return ReparameterizedPrompt(MLPEncoder(start, 16))
    return PromptEmbedding(start)


def engine_of(name, base, shards, world):
    (kind, dtype), recompute = CASES[name][:2], "recomputed" in name
    if kind == "padded":
        return padded_engine(base, AutoTokenizer.from_pretrained(BASE_DIR), dtype, 64, recompute)
    if base.config.model_type != "bloom":
        if "out of memory" in name and world and world.rank == world.size - 1:
            short_of_memory_within(shards.layers[1])
        return packed_engine(base, dtype, 60, recompute, sharded=shards is not None)
    if shards is None:
        return MicrobatchEngine(MicrobatchMajor(ResidentWeights(base, dtype)), 60)
    weights = ShardedWeights(base, shards, dtype)
    if "out of memory" in name and world.rank == world.size - 1:
        short_of_memory(weights)
    return MicrobatchEngine(LayerMajor(weights, 4000, Path(tempfile.gettempdir())), 60)


def run(name, world=None, folder=None):
    """Steps, the prompt [P, H] after them, and of held-out rows the losses, their sum, and answers; of a rank of the
    `world`, else of one process that has everything."""
    _, dtype, P, n, rows_per_step = CASES[name]
    shared = world and "sharded" in name
    base, shards = shared_out(name, world, folder) if shared else (freeze(base_of(name), dtype), None)
    rows, held_out = random_examples(n, 17, seed=5), random_examples(7, 30, seed=6)
    torch.manual_seed(0)
    prompt = prompt_of(name, random_init(P)(base.get_input_embeddings().weight))
    engine, seen = engine_of(name, base, shards, world), Losses()
    generator = make_generator(engine, base, AutoTokenizer.from_pretrained(BASE_DIR))
    if world:
        rest = [shards.join] if shards else []
        engine, generator = DataParallelEngine(engine, world, *rest), DataParallelGenerator(generator, world, *rest)
    settings = GenerationSettings(max_new_tokens=4, do_sample=False)
    asked = [Request(row.input_ids, settings, prompt.weight.detach().clone()) for row in held_out]
    first = list(
        in_request_order(generator.generate(asked[:1], 2))
    )  # one rank alone passes through the base before training
    args = TrainingArguments(max_steps=STEPS, per_device_train_batch_size=rows_per_step, gradient_accumulation_steps=1)
    train(engine, prompt, ListLoader(rows, args), args, 1e-2, seen)
    values = prompt.weight.detach()
    (loss, targets), (bare, _) = engine.evaluate(values, held_out), engine.evaluate(None, held_out)
    found = {"loss": loss.item(), "bare": bare.item(), "targets": targets, "each": engine.row_losses(values, held_out)}
    asked = [Request(row.input_ids, settings, values) for row in held_out]
    found["answers"] = [
        first,
        *(list(in_request_order(generator.generate(some, 2))) for some in (asked[:1], asked[:5])),
    ]
    return seen.steps, values, found


def main(folder):
    with process_group() as world:
        for name in CASES:
            steps, values, found = run(name, world, folder / "base")
            alike = world.all_gather(values.tolist())
            assert all(one == alike[0] for one in alike), "the ranks' prompts differ"
            if world.is_main:
                save_file({"prompt": values}, folder / f"{name}.safetensors")
                (folder / f"{name}.json").write_text(json.dumps({"steps": steps, **found}))
