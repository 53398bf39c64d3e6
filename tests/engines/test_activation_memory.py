"""Gradient checkpointing keeps less, and the estimate of a step's memory is near what a step takes."""

from functools import partial

import pytest
import torch
from helpers.memory import PeakMemory, bytes_saved_for_backward
from helpers.peers import gradient_of, random_examples
from helpers.small_bases import WINDOW, small_base

from softprompt.data.tokenization import Example
from softprompt.engines import factory
from softprompt.engines.factory import packed_engine, padded_engine
from softprompt.engines.memory_estimate import MAX_TOKENS, MEMORY_SHARE, MIN_TOKENS, resident_bytes
from softprompt.models.loading import freeze

FP32, BF16 = torch.float32, torch.bfloat16
SIZES = {  # so large that the tensors of a layer's middle matter more than its masks, as in real bases
    "llama": {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 384},
    "gemma3_text": {
        **{"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 384, "head_dim": 32},
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gpt2": {"num_hidden_layers": 4, "hidden_size": 128, "n_layer": 4, "n_embd": 128},
}
KINDS = pytest.mark.parametrize("kind", SIZES)
ENGINES = pytest.mark.parametrize("engine", ["packed", "padded"])
DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)


def engine_of(name, base, tokenizer, dtype, tokens, recompute):
    if name == "packed":
        return packed_engine(base, dtype, tokens, recompute)
    return padded_engine(base, tokenizer, dtype, tokens, recompute)


@KINDS
@ENGINES
@DTYPES
def test_gradient_checkpointing_keeps_less_for_the_backward_pass(kind, engine, dtype, tokenizer):
    base, rows = freeze(small_base(kind, **SIZES[kind]), dtype), random_examples(5, 3 * WINDOW, seed=1)
    start, kept = torch.randn(3, 128), []
    for recompute in (False, True):
        subject = engine_of(engine, base, tokenizer, dtype, 1000, recompute)
        kept.append(bytes_saved_for_backward(base, lambda subject=subject: gradient_of(subject, start, rows)))
    assert 0 < kept[1] < 0.5 * kept[0]


@KINDS
@ENGINES
@DTYPES
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("P", "lengths"), [(5, [60] * 4), (100, [20] * 8), (10, [150, 90, 40, 20])], ids=str)
def test_the_estimate_is_near_the_peak(kind, engine, dtype, recompute, P, lengths, tokenizer):
    base, start = freeze(small_base(kind, **SIZES[kind]), dtype), torch.randn(P, 128)
    rows = [Example([5] * n, [-100] * (n // 2) + [5] * (n - n // 2)) for n in lengths]
    subject = engine_of(engine, base, tokenizer, dtype, 4000, recompute)
    estimate = subject.activation_bytes(P, rows)
    with PeakMemory() as memory:
        gradient_of(subject, start, rows)
    assert 0.75 < estimate / memory.peak < 1.5


@pytest.mark.parametrize("P", [0, 50])
@ENGINES
def test_the_default_micro_batch_fits_into_the_memory_with_the_prompt(engine, P, tokenizer, monkeypatch):
    base, memory = freeze(small_base("llama", **SIZES["llama"]), FP32), 45_000_000
    monkeypatch.setattr(factory, "total_memory", lambda device: memory)
    build = {"packed": packed_engine, "padded": partial(padded_engine, tokenizer=tokenizer)}[engine]
    subject = build(base, dtype=FP32, P=P)
    taken = resident_bytes(base) + subject.activation_bytes(P, [Example([5] * 206, [5] * 206)] * 20)
    assert MIN_TOKENS < subject.tokens_per_microbatch < MAX_TOKENS["cpu"]
    assert 0.4 * memory < taken < (MEMORY_SHARE + 0.01) * memory
