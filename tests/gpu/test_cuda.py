"""What only a GPU can show: `python -m pytest -n 0 -m gpu`. With SOFTPROMPT_TEST_DEVICE=cpu the same tests run on the
CPU.

References are computed on the CPU in fp32 by definition. In half precision, PEFT's own autocast on the same device
says how far from them rounding leads.
"""

import copy
import functools
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers.bases import make_bloom
from helpers.packed_cases import relative
from helpers.peers import gradient_of, greedy_alone, naive_gradient, peft_gradient, random_examples
from helpers.short_runs import interrupted, outcome
from helpers.small_bases import WINDOW, small_base

import softprompt
from softprompt.config.loader import train_config
from softprompt.engines.choice import attn_implementations, choose_engine
from softprompt.engines.factory import make_engine
from softprompt.generation.generator import in_request_order, make_generator
from softprompt.generation.requests import GenerationSettings, Request
from softprompt.models.loading import freeze, move_to_device
from softprompt.runs.train_state import load_state

pytestmark = pytest.mark.gpu
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
KINDS = ["bloom", "llama", "qwen2", "gemma2", "gemma3_text", "gpt2", "gpt_oss"]
EXACT = 1e-3  # relative; the order of sums differs between devices


@pytest.fixture(scope="module")
def device():
    name = os.environ.get("SOFTPROMPT_TEST_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, or SOFTPROMPT_TEST_DEVICE=cpu")
    return torch.device(name)


def base_on_cpu(kind):
    base = (make_bloom() if kind == "bloom" else small_base(kind)).requires_grad_(False)
    if kind == "gpt_oss":  # torch's grouped product over experts takes bf16 alone on CUDA
        base.set_experts_implementation("eager")
    return base


def engine_on(device, base, tokenizer, dtype, kind, P, **settings):
    """The frozen base and an engine: padded, packed with scaled_dot_product_attention, or "kernel": packed with the
    attention that is tried first."""
    frozen = move_to_device(freeze(copy.deepcopy(base), dtype), device)
    config = train_config(model_name_or_path="x", dataset="x", **settings)
    kernel = attn_implementations(config, frozen, dtype)[0] if kind == "kernel" else "sdpa"
    kind = "packed" if kind == "kernel" else kind
    return frozen, make_engine(config, frozen, tokenizer, dtype, P, kind=kind, attn_implementation=kernel)


def prompt_of(P):
    return torch.randn(P, 32, generator=torch.Generator().manual_seed(P))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ["packed", "padded"])
@pytest.mark.parametrize("P", [1, 10, 100])
def test_fp32_gradient_is_that_of_rows_run_alone(kind, engine, P, device, tokenizer):
    base, start, rows = base_on_cpu(kind), prompt_of(P), random_examples(9, 3 * WINDOW, seed=P)
    mean, truth = naive_gradient(base, start, rows)
    loss, gradient = gradient_of(engine_on(device, base, tokenizer, FP32, engine, P)[1], start, rows)
    assert loss == pytest.approx(mean, rel=EXACT) and relative(gradient, truth) < EXACT
    _, peer = peft_gradient(move_to_device(copy.deepcopy(base), device), start, rows)
    assert relative(gradient, peer) < EXACT


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ["packed", "kernel", "padded"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_half_precision_is_about_as_exact_as_pefts_autocast(kind, engine, dtype, device, tokenizer):
    """The mean over five prompts, as single ones scatter."""
    ours, pefts = 0.0, 0.0
    for seed in range(5):
        base, rows = base_on_cpu(kind), random_examples(9, 3 * WINDOW, seed=seed)
        start = torch.randn(5, 32, generator=torch.Generator().manual_seed(seed))
        _, truth = naive_gradient(base, start, rows)
        _, peer = peft_gradient(move_to_device(copy.deepcopy(base), device), start, rows, dtype)
        _, gradient = gradient_of(engine_on(device, base, tokenizer, dtype, engine, 5)[1], start, rows)
        ours, pefts = ours + relative(gradient, truth), pefts + relative(peer, truth)
    assert ours < 1.5 * pefts


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_check_accepts_the_packed_engine_with_each_kernel(kind, dtype, device, tokenizer):
    frozen, rows = move_to_device(freeze(base_on_cpu(kind), dtype), device), random_examples(9, 3 * WINDOW, seed=1)
    named = {"model_name_or_path": "x", "dataset": "x", "engine": "packed"}
    for kernel in attn_implementations(train_config(**named), frozen, dtype):
        config = train_config(**named, attn_implementation=kernel)
        chosen = choose_engine(config, frozen, tokenizer, dtype, prompt_of(10).to(device), rows)
        assert "checked against the padded one" in chosen.how
        assert chosen.engine.schedule.attn_implementation == kernel


@pytest.mark.parametrize("kind", ["bloom", "llama"])
@pytest.mark.parametrize("engine", ["packed", "padded"])
def test_running_out_of_memory_cuts_finer_and_changes_nothing(kind, engine, device, tokenizer, capsys):
    if device.type != "cuda":
        pytest.skip("the CPU's memory is not to be filled")
    rows, start = random_examples(64, 200, seed=1), prompt_of(10)
    base = base_on_cpu(kind)
    _, subject = engine_on(device, base, tokenizer, FP32, engine, 10)
    expected = gradient_of(subject, start, rows)
    _, subject = engine_on(device, base, tokenizer, FP32, engine, 10, tokens_per_microbatch=1 << 20)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (24 << 20)) / total)
        loss, gradient = gradient_of(subject, start, rows)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert subject.tokens_per_microbatch < 1 << 20 and "out of memory" in "".join(capsys.readouterr())
    assert loss == pytest.approx(expected[0], rel=EXACT) and relative(gradient, expected[1]) < EXACT


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_greedy_answers_are_those_of_each_text_alone(kind, batch_size, device, tokenizer):
    """Prompts of three lengths and none share a batch; slots refill."""
    base, draw = base_on_cpu(kind), torch.Generator().manual_seed(3)
    prompts = [None, *(torch.randn(P, 32, generator=draw) for P in (1, 4, WINDOW + 3))]
    lengths = (2, 3 * WINDOW, WINDOW, WINDOW + 5, 1, 7, 2 * WINDOW)
    asked = [(torch.randint(5, 300, (n,), generator=draw).tolist(), prompts[i % 4]) for i, n in enumerate(lengths)]
    greedy = GenerationSettings(max_new_tokens=2 * WINDOW, do_sample=False)
    frozen, engine = engine_on(device, base, tokenizer, FP32, "packed", 10)
    for kind_of_engine in ("packed", "padded"):
        generator = make_generator(engine, frozen, tokenizer, kind_of_engine)
        answers = generator.generate([Request(text, greedy, prompt) for text, prompt in asked], batch_size)
        alone = [greedy_alone(base, text, prompt, greedy.max_new_tokens) for text, prompt in asked]
        assert list(in_request_order(answers)) == alone


@pytest.mark.parametrize("engine", ["packed", "padded"])
@pytest.mark.parametrize("precision", [{}, {"bf16": False}, {"fp16": True, "bf16": False}], ids=str)
def test_a_killed_run_resumes_to_the_byte(engine, precision, device, run_settings):
    settings = {**run_settings, "device": device.type, "engine": engine, "deterministic": True, **precision}
    softprompt.train(**settings)
    expected = outcome()
    shutil.rmtree("run")
    interrupted(settings, 5)
    softprompt.train(resume_from_checkpoint="run")
    assert outcome() == expected


def test_fp16_steps_that_overflow_are_skipped(device, run_settings, monkeypatch):
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**24))
    softprompt.train(**{**run_settings, "device": device.type, "fp16": True, "bf16": False})
    state, _ = load_state(Path("run/checkpoint-13"))
    assert 2 <= state.step - state.taken < 12
