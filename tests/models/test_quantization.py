"""A base that is quantized to 8 or 4 bits while it loads: losses, gradients and answers are those of the dequantized
weights, it takes less memory, and training does not change it."""

import copy

import pytest
import torch
from helpers.peers import greedy_alone, naive_loss, random_examples
from helpers.programs import assert_line, jsonl, refusal, refused, run_infer, run_program
from helpers.quantized import BF16, CPU, FP32, base_to_quantize, codes_by_hand, nf4, rounded_by_hand, saved
from helpers.short_runs import interrupted
from transformers.pytorch_utils import Conv1D

import infer
import softprompt
import train
from softprompt.config.loader import train_config
from softprompt.engines.choice import choose_engine
from softprompt.engines.factory import make_engine
from softprompt.engines.memory_estimate import resident_bytes
from softprompt.generation.generator import in_request_order, make_generator
from softprompt.generation.requests import GenerationSettings, Request
from softprompt.mini import BASE_DIR
from softprompt.models.bitsandbytes_linear import dequantize, has_bitsandbytes_weight
from softprompt.models.loading import freeze, load_base, word_embeddings
from softprompt.models.precision import autocast
from softprompt.prompt.adapter_io import load_adapter
from softprompt.prompt.soft_prompt import PromptEmbedding
from softprompt.utils.errors import CheckpointError

pytest.importorskip("bitsandbytes", reason="needs pip install bitsandbytes")
pytest.importorskip("accelerate", reason="needs pip install accelerate")

EACH_BITS = pytest.mark.parametrize("bits", [8, 4])
KINDS = ["bloom", "llama", "gpt2", "gemma2"]


def quantized_and_reference(kind, bits, folder, dtype=FP32):
    """A base as loaded with --load_in_8bit or --load_in_4bit, and a plain one with the weights that result."""
    base = base_to_quantize(kind)
    quantized = load_base(str(saved(base, folder)), CPU, dtype, bits)
    return quantized, freeze(rounded_by_hand(base, bits, quantized), dtype)


def engine_of(kind, base, tokenizer, dtype, P):
    config = train_config("mini", engine=kind, tokens_per_microbatch=60)
    return make_engine(config, base, tokenizer, dtype, P)


def loss_and_gradient(engine, values, rows):
    prompt = PromptEmbedding(values.clone())
    loss, targets = engine.accumulate(prompt, rows, 1 / 7)
    return loss.item() / targets, prompt.weight.grad


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("P", [1, 10])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@EACH_BITS
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_those_of_the_dequantized_weights(kind, bits, dtype, P, tmp_path, tokenizer):
    """In bf16, the gradient is about as far from that in fp32 as autocast's is: each rounds in its own way."""
    base, reference = quantized_and_reference(kind, bits, tmp_path, dtype)
    values, rows = torch.randn(P, 64, generator=torch.Generator().manual_seed(1)), random_examples(9, 20)
    targets = sum(label != -100 for row in rows for label in row.labels)

    def naive(model, compute_dtype):
        prompt = values.clone().requires_grad_()
        with autocast(CPU, compute_dtype):
            loss = naive_loss(model, prompt, rows)
        (loss * targets / 7).backward()
        return loss.item(), prompt.grad

    _, truth = naive(copy.deepcopy(reference).float(), FP32)
    expected, peer = naive(reference, dtype)
    most = 1e-5 if dtype is FP32 else 1.5 * relative(peer, truth)
    for engine in ("packed", "padded"):
        loss, gradient = loss_and_gradient(engine_of(engine, base, tokenizer, dtype, P), values, rows)
        assert loss == pytest.approx(expected, abs=1e-5 if dtype is FP32 else 0.02)
        assert relative(gradient, truth) < most


@EACH_BITS
def test_codes_are_those_of_the_formats(bits, tmp_path):
    base = base_to_quantize("gpt2")
    quantized = load_base(str(saved(base, tmp_path)), CPU, FP32, bits)
    compared = 0
    for name, module in quantized.named_modules():
        if has_bitsandbytes_weight(module):
            own = base.get_submodule(name)
            weight = own.weight.T if isinstance(own, Conv1D) else own.weight
            if bits == 4:
                assert torch.allclose(dequantize(module, FP32), nf4(weight), atol=1e-6)
            else:
                off = (module.weight.data.float() - codes_by_hand(weight)).abs()
                assert off.max() <= 1 and off.mean() < 0.1  # bitsandbytes rounds in fp16
            compared += 1
    assert compared == 8


BOUNDS = {8: 0.05, 4: 0.35}  # ‖g - g₀‖ / ‖g₀‖, as benchmarks/README.md says


@EACH_BITS
def test_on_the_mini_base_the_gradient_stays_near_the_unquantized_one(bits, tokenizer):
    bases, draw = [load_base(str(BASE_DIR), CPU, FP32, n) for n in (None, bits)], torch.Generator().manual_seed(2)
    words = word_embeddings(bases[0]).weight
    values, rows = words[torch.randint(4, len(words), (10,), generator=draw)], random_examples(16, 30, len(words))
    (exact_loss, exact), (loss, grad) = (
        loss_and_gradient(engine_of("packed", base, tokenizer, FP32, 10), values, rows) for base in bases
    )
    error = relative(grad, exact)
    print(f"{bits} bit: gradient {error:.4f}, loss {loss - exact_loss:+.4f}")
    assert 0 < error < BOUNDS[bits] and loss != exact_loss


@EACH_BITS
@pytest.mark.parametrize("kind", ["bloom", "llama"])
def test_steps_and_answers_leave_every_tensor_as_it_is(kind, bits, tmp_path, tokenizer):
    base, _ = quantized_and_reference(kind, bits, tmp_path)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    prompt, rows = PromptEmbedding(torch.randn(3, 64)), random_examples(6, 12)
    engine = engine_of("packed", base, tokenizer, FP32, 3)
    optimizer, gradients = torch.optim.AdamW(prompt.parameters(), lr=0.1), []
    for _ in range(3):
        optimizer.zero_grad()
        engine.accumulate(prompt, rows, 1.0)
        gradients.append(prompt.weight.grad.clone())
        engine.row_losses(prompt.weight.detach(), rows)  # a pass without a gradient
        base.generate(inputs_embeds=torch.randn(1, 3, 64), max_new_tokens=2, do_sample=False)
        optimizer.step()
    assert not torch.equal(gradients[0], gradients[2])
    after = base.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    fresh = load_base(str(tmp_path), CPU, FP32, bits)
    start = prompt.weight.detach()
    _, again = loss_and_gradient(engine, start, rows)
    _, first = loss_and_gradient(engine_of("packed", fresh, tokenizer, FP32, 3), start, rows)
    assert torch.equal(again, first)


@EACH_BITS
def test_a_rows_loss_does_not_depend_on_the_rows_beside_it(bits, tmp_path, tokenizer):
    base, _ = quantized_and_reference("llama", bits, tmp_path)
    with torch.no_grad():
        word_embeddings(base).weight[7] *= 50  # an outlier, for which LLM.int8 would change the products of all tokens
    rows, values = random_examples(6, 12), torch.randn(3, 64)
    rows[0] = type(rows[0])([7] * 8, [-100] * 7 + [7])
    engine = engine_of("padded", base, tokenizer, FP32, 3)
    together = engine.row_losses(values, rows)
    alone = [engine.row_losses(values, [row])[0] for row in rows]
    assert together == pytest.approx(alone, abs=1e-4)
    config = train_config("mini", engine="packed", tokens_per_microbatch=60, dry_run=True)
    chosen = choose_engine(config, base, tokenizer, FP32, values, rows)
    assert "packed engine: checked" in chosen.how


@EACH_BITS
@pytest.mark.parametrize("kind", KINDS)
def test_weights_take_less_memory(kind, bits, tmp_path, tokenizer):
    base, reference = quantized_and_reference(kind, bits, tmp_path)
    linear = [m for m in base.modules() if has_bitsandbytes_weight(m)]
    values = sum(dequantize(m, FP32).numel() for m in linear)
    blocks, rows = values / 64, sum(m.out_features for m in linear)
    saves = values * 3 - 4 * rows if bits == 8 else values * 3.5 - blocks - 4 * sum(-(-v // 256) for v in each(linear))
    assert resident_bytes(reference) - resident_bytes(base) == pytest.approx(saves, abs=1)
    assert base.num_parameters() == reference.num_parameters()


def each(linear):
    """The number of blocks of 64 values of each layer."""
    return [m.in_features * m.out_features // 64 for m in linear]


@EACH_BITS
@pytest.mark.parametrize("engine", ["packed", "padded"])
@pytest.mark.parametrize("kind", ["bloom", "llama"])
def test_answers_are_those_of_the_dequantized_weights(kind, engine, bits, tmp_path, tokenizer):
    base, reference = quantized_and_reference(kind, bits, tmp_path)
    prompts = [torch.randn(P, 64, generator=torch.Generator().manual_seed(P)) for P in (2, 5)]
    asked = [([9, 8, 7], prompts[0]), ([5], prompts[1]), ([20, 30, 40, 50], None)]
    settings = GenerationSettings(max_new_tokens=6, do_sample=False)
    generator = make_generator(engine_of(engine, base, tokenizer, FP32, 2), base, tokenizer, engine)
    found = in_request_order(generator.generate([Request(ids, settings, prompt) for ids, prompt in asked]))
    assert list(found) == [greedy_alone(reference, ids, prompt, 6) for ids, prompt in asked]


def test_a_copy_computes_with_its_own_weights(tmp_path):
    base, _ = quantized_and_reference("llama", 4, tmp_path)
    other, rows = copy.deepcopy(base), torch.randn(1, 4, 64)
    expected = other(inputs_embeds=rows).logits
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight.data.fill_(0)
    assert torch.equal(other(inputs_embeds=rows).logits, expected)
    assert not torch.equal(base(inputs_embeds=rows).logits, expected)


@pytest.fixture(params=["bloom", "llama"])
def folder(request, tmp_path, tokenizer, monkeypatch):
    """The current folder, with rows and a base in `base`."""
    saved(base_to_quantize(request.param), tmp_path / "base", tokenizer)
    (tmp_path / "rows.jsonl").write_bytes(jsonl(*[{"instruction": str(n), "output": "ok"} for n in range(9)]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


FLAGS = ["--model_name_or_path", "base", "--dataset", "rows.jsonl", "--eval_rows", "2", "--output_dir", "run"]


def test_training_and_asking_on_the_command_line(folder, capsys, monkeypatch):
    out, _ = run_program(train, [*FLAGS, "--load_in_4bit", "--max_steps", "2"], capsys, monkeypatch)
    assert "Base base in 4 bit on cpu, float32" in out
    assert "Try: python infer.py --adapter run --load_in_4bit --prompt " in out
    ask = ["--adapter", "run", "--prompt", "1", "--do_sample", "false", "--max_new_tokens", "4"]
    out, told = run_program(infer, [*ask, "--load_in_4bit"], capsys, monkeypatch)
    assert "warning" not in told
    model = softprompt.SoftPromptModel.from_pretrained(adapter="run", load_in_4bit=True)
    assert out == model.generate("1", do_sample=False, max_new_tokens=4) + "\n"
    (folder / "p.txt").write_text("1", encoding="utf-8")
    many = [*ask[:2], *ask[4:], "--prompts_file", "p.txt", "--output_file", "o.jsonl"]
    run_infer([*many, "--load_in_4bit"], capsys, monkeypatch)
    line = refusal(infer, many, capsys, monkeypatch)  # not by the weights that it was begun with
    assert_line(line, "is from another run, with bits 4")
    assert model.classify(["1"], ["ok", "no"])[0].probability > 0
    assert model.generate("1", num_beams=2, max_new_tokens=3) is not None


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_other_bits_than_in_training_are_told(folder, capsys, monkeypatch):
    run_program(train, [*FLAGS, "--load_in_4bit", "--max_steps", "1"], capsys, monkeypatch)
    run_program(train, [*FLAGS[:-1], "plain", "--max_steps", "1"], capsys, monkeypatch)
    ask = ["--prompt", "1", "--do_sample", "false", "--max_new_tokens", "4"]
    for adapter, flags in (("run", []), ("run", ["--load_in_8bit"]), ("plain", ["--load_in_8bit"])):
        _, told = run_program(infer, ["--adapter", adapter, *ask, *flags], capsys, monkeypatch)
        (line,) = [line for line in told.splitlines() if line.startswith("warning")]
        assert adapter in line and ("--load_in_4bit" in line or adapter == "plain")
    settings = folder / "plain/softprompt.json"
    settings.write_text('{"template": "default"}')  # written by an earlier version, which did not record the bits
    assert "warning" not in run_program(infer, ["--adapter", "plain", *ask, "--load_in_8bit"], capsys, monkeypatch)[1]


@pytest.mark.parametrize("flags", [["--offload_folder", "x"], ["--max_activation_gib", "2"]], ids=" ".join)
def test_offloading_is_refused_where_a_base_is_not_run_block_by_block(flags, folder, request, capsys, monkeypatch):
    kind = request.node.callspec.params["folder"]
    dry = [*FLAGS, *flags, "--dry_run"]
    if kind == "bloom":
        run_program(train, [*dry, "--load_in_4bit"], capsys, monkeypatch)
        line = refused(train, [*dry, "--load_in_4bit", "--engine", "padded"], capsys, monkeypatch, folder)
        assert_line(line, f"{flags[0]}: --engine padded")
        assert_line(refused(train, dry, capsys, monkeypatch, folder), f"{flags[0]}.* only used with --stream_base")
    else:
        line = refused(train, [*dry, "--load_in_4bit"], capsys, monkeypatch, folder)
        assert_line(line, rf"{flags[0]}: only BLOOM .* type llama; leave it out")


def test_a_dry_run_estimates_memory(folder, capsys, monkeypatch):
    out, _ = run_program(train, [*FLAGS, "--load_in_8bit", "--dry_run"], capsys, monkeypatch)
    assert "memory      about" in out and not (folder / "run").exists()


@EACH_BITS
def test_an_interrupted_run_resumes_to_the_same_prompt(folder, bits):
    settings = {"model_name_or_path": "base", "dataset": "rows.jsonl", "max_steps": 6, "save_steps": 2}
    settings |= {f"load_in_{bits}bit": True, "per_device_train_batch_size": 2}
    softprompt.train(**settings, output_dir="straight")
    interrupted({**settings, "output_dir": "cut"}, at=3)
    softprompt.train(output_dir="cut", resume_from_checkpoint="cut/checkpoint-2")
    assert torch.equal(load_adapter("cut").prompt, load_adapter("straight").prompt)


def test_a_run_resumes_in_other_bits_but_not_without(folder):
    settings = {"model_name_or_path": "base", "dataset": "rows.jsonl", "output_dir": "run"}
    softprompt.train(**settings, load_in_8bit=True, max_steps=1)
    with pytest.raises(CheckpointError, match="base"):
        softprompt.train(output_dir="run", resume_from_checkpoint="run", max_steps=2, load_in_8bit=False)
    softprompt.train(output_dir="run", resume_from_checkpoint="run", max_steps=2, load_in_4bit=True)


@pytest.mark.parametrize("program", [train, infer])
def test_both_flags_are_refused(program, place, capsys, monkeypatch):
    more = [] if program is train else ["--adapter", "a", "--prompt", "好"]
    line = refused(program, [*more, "--load_in_8bit", "--load_in_4bit"], capsys, monkeypatch, place)
    assert_line(line, "--load_in_8bit and --load_in_4bit exclude each other; give one of them")


def test_streaming_and_sharding_are_refused(place, capsys, monkeypatch):
    for flag in ("--stream_base", "--shard_base"):
        line = refused(train, ["--load_in_4bit", flag], capsys, monkeypatch, place)
        assert_line(line, "--load_in_8bit and --load_in_4bit .*--stream_base and --shard_base; give only one of")


@pytest.mark.parametrize("missing", ["bitsandbytes", "accelerate"])
def test_a_missing_library_is_named(missing, folder, capsys, monkeypatch):
    run_program(train, [*FLAGS, "--max_steps", "1"], capsys, monkeypatch)
    monkeypatch.setitem(__import__("sys").modules, missing, None)
    argv = {train: [*FLAGS, "--overwrite_output_dir"], infer: ["--adapter", "run", "--prompt", "1"]}
    for program, more in argv.items():
        line = refused(program, [*more, "--load_in_8bit"], capsys, monkeypatch, folder)
        assert_line(line, "need bitsandbytes and accelerate: pip install bitsandbytes accelerate")
