"""A base in 8 or 4 bit: exactly that of the rounded weights, near the unquantized one, smaller, and refused where it
cannot be."""

import copy

import pytest
import torch
from helpers.bases import make_bloom
from helpers.peers import greedy_alone, naive_loss, random_examples
from helpers.programs import assert_line, jsonl, refused, run_infer

import infer
import softprompt
import train
from softprompt.config.loader import train_config
from softprompt.engines.factory import make_engine
from softprompt.generation.bloom_step import BloomStepModel
from softprompt.generation.continuous_batching import ContinuousBatchingGenerator
from softprompt.generation.requests import GenerationSettings, Request
from softprompt.mini import BASE_DIR
from softprompt.models.bloom_weights import BLOCK_MODULES
from softprompt.models.loading import freeze, load_base
from softprompt.prompt.soft_prompt import PromptEmbedding
from softprompt.utils.errors import ConfigError

functional = pytest.importorskip("bitsandbytes.functional", reason="needs pip install bitsandbytes")
from softprompt.models.quantization import QuantizedWeights, quantize_blocks  # noqa: E402

FP32, CPU = torch.float32, torch.device("cpu")


def rounded_by_hand(base, bits):
    """A copy of the base whose blocks' weights are what comes out of the formats, by their definitions."""
    base = copy.deepcopy(base)
    for block in base.transformer.h:
        for name in BLOCK_MODULES:
            module = block.get_submodule(name)
            if module.weight.dim() == 2:
                module.weight.data = int8(module.weight) if bits == 8 else nf4(module.weight)
    return base


def int8(weight):
    largest = weight.abs().amax(1, keepdim=True)
    return (weight * 127 / largest).round() * largest / 127


def nf4(weight):
    """The nearest of 16 levels times the block's largest value; that in 8 bit is the library's own doing."""
    levels = functional.get_4bit_type("nf4", device="cpu").data
    blocks = weight.reshape(-1, 64)
    largest = blocks.abs().amax(1)
    codes = (blocks / largest[:, None]).unsqueeze(-1).sub(levels).abs().argmin(-1)
    kept, state = functional.quantize_blockwise(largest - largest.mean(), blocksize=256)
    largest = functional.dequantize_blockwise(kept, state) + largest.mean()
    return (levels[codes] * largest[:, None]).reshape(weight.shape)


def engine_of(base, bits, P, **settings):
    config = train_config("mini", engine="packed", tokens_per_microbatch=40, **settings)
    return make_engine(config, base, None, FP32, P, quantize_blocks(base, bits, CPU) if bits else None)


def gradient(base, bits, values, rows):
    engine, prompt = engine_of(copy.deepcopy(base), bits, len(values)), PromptEmbedding(values.clone())
    loss, targets = engine.accumulate(prompt, rows, 1 / 7)
    return loss.item() / targets, prompt.weight.grad


@pytest.mark.parametrize("bits", [8, 4])
def test_loss_and_gradient_are_those_of_a_base_with_the_rounded_weights(bits):
    base = freeze(make_bloom(n_layer=3, hidden_size=64), FP32)
    values, rows = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)), random_examples(9, 20)
    prompt = values.clone().requires_grad_()
    expected = naive_loss(rounded_by_hand(base, bits), prompt, rows)
    targets = sum(label != -100 for row in rows for label in row.labels)
    (expected * targets / 7).backward()
    loss, grad = gradient(base, bits, values, rows)
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    assert torch.allclose(grad, prompt.grad, atol=1e-5 * max(1, prompt.grad.abs().max().item()))


BOUNDS = {8: 0.05, 4: 0.35}  # ‖g - g₀‖ / ‖g₀‖, as benchmarks/README.md says


@pytest.mark.parametrize("bits", [8, 4])
def test_on_the_mini_base_the_gradient_stays_near_the_unquantized_one(bits):
    base, draw = load_base(str(BASE_DIR), CPU, FP32), torch.Generator().manual_seed(2)
    words = base.get_input_embeddings().weight
    values, rows = words[torch.randint(4, len(words), (10,), generator=draw)], random_examples(16, 30, len(words))
    exact_loss, exact = gradient(base, None, values, rows)
    loss, grad = gradient(base, bits, values, rows)
    error = ((grad - exact).norm() / exact.norm()).item()
    print(f"{bits} bit: gradient {error:.4f}, loss {loss - exact_loss:+.4f}")
    assert 0 < error < BOUNDS[bits] and loss != exact_loss


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_take_less_memory(bits):
    base = freeze(make_bloom(n_layer=3, hidden_size=256, n_head=8), FP32)
    linear = [
        block.get_submodule(name) for block in base.transformer.h for name in BLOCK_MODULES if "layernorm" not in name
    ]
    own = sum(module.weight.nbytes for module in linear)
    rounded = quantize_blocks(base, bits, CPU)
    held = rounded.nbytes
    assert held / own == pytest.approx({8: 0.25, 4: 0.125 + 1 / 256}[bits], rel=0.03)
    assert all(module.weight.is_meta for module in linear)
    assert QuantizedWeights(base, rounded, FP32).extra_bytes == held + 2 * 4 * 12 * 256**2


@pytest.mark.parametrize("bits", [8, 4])
def test_answers_are_those_of_the_rounded_weights(bits, tokenizer):
    base = freeze(make_bloom(seed=2, hidden_size=64), FP32)
    naive, rounded = rounded_by_hand(base, bits), quantize_blocks(base, bits, CPU)
    prompts = [torch.randn(P, 64, generator=torch.Generator().manual_seed(P)) for P in (2, 5)]
    asked = [([9, 8, 7], prompts[0]), ([5], prompts[1]), ([20, 30, 40, 50], None)]
    settings = GenerationSettings(max_new_tokens=6, do_sample=False)
    generator = ContinuousBatchingGenerator(BloomStepModel(QuantizedWeights(base, rounded, FP32)), tokenizer)
    found = dict(generator.generate([Request(ids, settings, prompt) for ids, prompt in asked]))
    assert [found[n] for n in range(3)] == [greedy_alone(naive, ids, prompt, 6) for ids, prompt in asked]


def test_training_and_asking_on_the_command_line(place, tiny_base, capsys, monkeypatch):
    (place / "rows.jsonl").write_bytes(jsonl(*[{"instruction": str(n), "output": "ok"} for n in range(6)]))
    flags = ["--model_name_or_path", tiny_base, "--dataset", "rows.jsonl", "--eval_rows", "2", "--output_dir", "run"]
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, flags), "--load_in_4bit", "--max_steps", "2"])
    train.main([*map(str, flags), "--load_in_4bit", "--max_steps", "2"])
    out = capsys.readouterr().out
    assert f"Base {tiny_base} in 4 bit on cpu, float32, packed engine" in out
    assert "Try: python infer.py --adapter run --load_in_4bit --prompt " in out
    ask = ["--adapter", "run", "--prompt", "1", "--do_sample", "false", "--max_new_tokens", "4"]
    out = run_infer([*ask, "--load_in_4bit"], capsys, monkeypatch)
    model = softprompt.SoftPromptModel.from_pretrained(adapter="run", load_in_4bit=True)
    assert out == model.generate("1", do_sample=False, max_new_tokens=4) + "\n"
    (place / "p.txt").write_text("1", encoding="utf-8")
    many = [*ask[:2], *ask[4:], "--prompts_file", "p.txt", "--output_file", "o.jsonl"]
    run_infer([*many, "--load_in_4bit"], capsys, monkeypatch)
    line = refused(infer, many, capsys, monkeypatch, place)  # not by the weights that it was begun with
    assert_line(line, "is from another run, with bits 4")
    assert model.classify(["1"], ["ok", "no"])[0].probability > 0
    with pytest.raises(ConfigError, match="--num_beams needs the base's own weights"):
        model.generate("1", num_beams=2)


BOTH = {
    "--load_in_8bit --load_in_4bit": "--load_in_8bit and --load_in_4bit exclude each other; give one of them",
    "--load_in_4bit --engine padded": "are for the packed engine; leave --engine padded out",
}


@pytest.mark.parametrize("program", [train, infer])
@pytest.mark.parametrize("flags", BOTH)
def test_what_is_refused(flags, program, place, capsys, monkeypatch):
    more = [] if program is train else ["--adapter", "a", "--prompt", "好"]
    assert_line(refused(program, [*more, *flags.split()], capsys, monkeypatch, place), BOTH[flags])


def test_what_else_is_refused(place, capsys, monkeypatch):
    line = refused(train, ["--load_in_4bit", "--stream_base"], capsys, monkeypatch, place)
    assert_line(line, "--load_in_8bit and --load_in_4bit .*--stream_base and --shard_base; give only one of")
    base = make_bloom()
    base.config.model_type = "llama"
    with pytest.raises(ConfigError, match=r"--load_in_8bit is for BLOOM, and .* is of type llama"):
        quantize_blocks(base, 8, CPU)
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    line = refused(infer, ["--adapter", "a", "--prompt", "好", "--load_in_8bit"], capsys, monkeypatch, place)
    assert_line(line, "need bitsandbytes: pip install")
