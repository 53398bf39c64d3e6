"""The attention kernels for CUDA. The functions that FlexAttention gets run here uncompiled; torch's variable-length
kernel, which exists on CUDA alone, is replaced by its definition."""

import math
from contextlib import contextmanager

import pytest
import torch
from helpers.bases import make_bloom
from helpers.kernels import naive_varlen
from helpers.packed_cases import relative
from helpers.peers import gradient_of, naive_gradient, random_examples
from helpers.small_bases import small_base
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen

from softprompt.engines import flex_attention, varlen_attention
from softprompt.engines.bloom_schedule import MicrobatchMajor
from softprompt.engines.decoder_attention import AttentionOptions, LayerKV, PackedRows, packed_attention
from softprompt.engines.decoder_schedule import DecoderSchedule, JointDecoderSchedule
from softprompt.engines.flex_attention import BLOCK, FlexRows, FlexStream
from softprompt.engines.microbatch_engine import MicrobatchEngine
from softprompt.engines.prefix_attention import alibi_slopes
from softprompt.engines.varlen_attention import VarlenRows
from softprompt.models.bloom_weights import ResidentWeights
from softprompt.models.loading import freeze

CPU, N, K, D = torch.device("cpu"), 4, 2, 8
LENGTHS = [[1], [300, 129, 128, 127, 9, 1]]
PROMPTS = [0, 10, 128, 300]
MODULE = nn.Module()
OPTIONS = {
    "plain": AttentionOptions(None, None, None, None),
    "scaled": AttentionOptions(0.3, None, None, None),
    "window": AttentionOptions(None, 7, None, None),
    "window of 1": AttentionOptions(None, 1, None, None),
    "soft cap": AttentionOptions(0.5, 20, 3.0, None),
    "sinks": AttentionOptions(None, 5, None, torch.tensor([0.5, -1.0, 2.0, 0.0])),
}


def tensors(S, P, seed=0):
    """Queries, keys and values of S tokens, and the prompt's keys and values."""
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(S, heads, D, generator=draw) for heads in (N, K, K))
    prompt = LayerKV(*(torch.randn(P, K, D, generator=draw) for _ in range(2)))
    return q, k, v, prompt


def by_definition(q, k, v, prompt, lengths, options, slopes=None):
    """Attention of each query by itself: its row's keys up to its own, behind the prompt's."""
    outputs, start, P = [], 0, len(prompt.keys)
    scale = D**-0.5 if options.scaling is None else options.scaling
    for length in lengths:
        keys, values = (torch.cat([p, t[start : start + length]]) for p, t in zip(prompt, (k, v), strict=True))
        for i in range(length):
            seen = range(max(0, P + i + 1 - (options.window or math.inf)), P + i + 1)
            heads = []
            for h in range(N):
                scores = torch.stack([q[start + i, h] @ keys[j, h * K // N] * scale for j in seen])
                if options.softcap:
                    scores = options.softcap * (scores / options.softcap).tanh()
                if slopes is not None:
                    scores = scores - slopes[h] * torch.tensor([P + i - j for j in seen])
                if options.sinks is not None:
                    weights = torch.cat([scores, options.sinks[h : h + 1]]).softmax(0)[:-1]
                else:
                    weights = scores.softmax(0)
                heads.append(sum(w * values[j, h * K // N] for w, j in zip(weights, seen, strict=True)))
            outputs.append(torch.stack(heads))
        start += length
    return torch.stack(outputs)


@pytest.fixture
def varlen_on_cpu(monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", naive_varlen)
    monkeypatch.setattr(varlen_attention, "is_half", lambda dtype: True)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("P", [0, 1, 10])
@pytest.mark.parametrize("kind", [PackedRows, FlexRows, VarlenRows])
def test_attention_is_that_of_its_definition(kind, name, P, varlen_on_cpu):
    lengths = [9, 5, 5, 2, 1]
    q, k, v, prompt = tensors(sum(lengths), P)
    rows = kind(lengths, CPU, P, {MODULE: prompt} if P else {})
    with torch.no_grad():
        out = rows.attend(MODULE, q, k, v, OPTIONS[name])
    torch.testing.assert_close(out, by_definition(q, k, v, prompt, lengths, OPTIONS[name]))


@pytest.mark.parametrize("name", OPTIONS)
def test_on_the_cpu_attention_is_computed_in_fp32_although_the_base_runs_under_autocast(name):
    lengths, P = [9, 5, 1], 3
    q, k, v, prompt = tensors(sum(lengths), P)
    q, k, v = (t.bfloat16() for t in (q, k, v))
    inputs = (t.transpose(0, 1)[None] for t in (q, k, v))
    rows = PackedRows(lengths, CPU, P, {MODULE: prompt})
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out, _ = packed_attention(MODULE, *inputs, None, OPTIONS[name][0], 0.0, *OPTIONS[name][1:], packed_rows=rows)
    wide = (t.float() for t in (q, k, v))
    torch.testing.assert_close(out[0], by_definition(*wide, prompt, lengths, OPTIONS[name]))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("P", PROMPTS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("kind", [FlexRows, VarlenRows])
def test_kernels_agree_over_many_blocks(kind, lengths, P, name, varlen_on_cpu):
    q, k, v, prompt = tensors(sum(lengths), P, seed=1)
    shared = {MODULE: prompt} if P else {}
    with torch.no_grad():
        out = kind(lengths, CPU, P, shared).attend(MODULE, q, k, v, OPTIONS[name])
        expected = PackedRows(lengths, CPU, P, shared).attend(MODULE, q, k, v, OPTIONS[name])
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("P", [0, 1, 10, 130])
def test_alibi_is_that_of_its_definition(P):
    lengths = [9, 5, 5, 2, 1]
    q, k, v, prompt = tensors(sum(lengths), P, seed=2)
    slopes = torch.tensor(alibi_slopes(N))
    stream = FlexStream(lengths, CPU, P)
    keys, values = (torch.cat([p, t]) for p, t in zip(prompt, (k, v), strict=True))
    with torch.no_grad():
        out = stream.attend(q, keys, values, stream.alibi(slopes))
    torch.testing.assert_close(out, by_definition(q, k, v, prompt, lengths, OPTIONS["plain"], slopes))


@pytest.mark.parametrize("grouped", [True, False])
def test_gradients_through_the_variable_length_kernel(grouped, varlen_on_cpu, monkeypatch):
    """The prompt's keys and values are used by all rows, so their gradients add up."""
    monkeypatch.setattr(varlen_attention, "GROUPED_QUERIES", grouped)
    lengths, P = [12, 5, 5, 1], 3
    gradients = []
    for kind in (VarlenRows, PackedRows):
        leaves = [
            t.requires_grad_() for part in tensors(sum(lengths), P) for t in (part if type(part) is LayerKV else [part])
        ]
        q, k, v, *prompt = leaves
        out = kind(lengths, CPU, P, {MODULE: LayerKV(*prompt)}).attend(MODULE, q, k, v, OPTIONS["window"])
        out.square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*gradients)


def test_flex_attention_skips_blocks_that_no_row_sees():
    """Many short rows: a block of queries sees the prompt's block, and its own and the one before."""
    stream = FlexStream([8] * 400, CPU, 10)
    counts = stream.mask(None).kv_num_blocks[0, 0]
    assert len(counts) == 25 and int(counts.max()) <= 3


@pytest.mark.parametrize("window", [None, 7, 200])
@pytest.mark.parametrize("P", PROMPTS)
@pytest.mark.parametrize("lengths", [*LENGTHS, [8] * 60], ids=str)
def test_flex_attention_skips_no_block_that_a_query_sees(lengths, P, window):
    """Uncompiled, FlexAttention ignores the table of blocks, so the other tests cannot see what it leaves out."""
    stream = FlexStream(lengths, CPU, P)
    table, queries, keys = stream.mask(window), len(stream.query_row), len(stream.key_row)
    see = stream.mask_function(window)(None, None, torch.arange(queries)[:, None], torch.arange(keys)[None])
    blocks = see.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).any(3).any(1)  # [queries / BLOCK, keys / BLOCK]
    for count, index, needed in zip(table.kv_num_blocks[0, 0], table.kv_indices[0, 0], blocks, strict=True):
        assert set(needed.nonzero()[:, 0].tolist()) <= set(index[:count].tolist())


@pytest.mark.parametrize("name", ["alibi", "plain", "scaled", "window", "soft cap"])
def test_one_compiled_kernel_serves_all_micro_batches(name, monkeypatch):
    """Sizes that are equal in one micro-batch and differ in the next, and a stream shorter than a block. Each layer's
    call makes new score and mask functions."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    kernel = torch.compile(flex_attention.flex_attention, dynamic=True, backend=backend)
    monkeypatch.setattr(flex_attention, "_kernel", lambda device_type: kernel)
    slopes, P = torch.tensor(alibi_slopes(N)), 10
    for lengths in ([200, 100, 3], [129] * 5, [64, 64], [2], [300, 68]):
        q, k, v, prompt = tensors(sum(lengths), P)
        rows = FlexRows(lengths, CPU, P, {MODULE: prompt})
        with torch.no_grad():
            for _ in range(2):
                if name == "alibi":
                    keys, values = (torch.cat([p, t]) for p, t in zip(prompt, (k, v), strict=True))
                    rows.stream.attend(q, keys, values, rows.stream.alibi(slopes))
                else:
                    rows.attend(MODULE, q, k, v, OPTIONS[name])
    assert len(compiled) == 1


@pytest.mark.parametrize("P", [1, 10])
def test_losses_of_bloom_with_flex_attention(P):
    """Forward only: FlexAttention has no backward on the CPU."""
    weights = ResidentWeights(freeze(make_bloom(), torch.float32), torch.float32)
    rows, prompt = random_examples(9, 60, seed=P), torch.randn(P, 32, generator=torch.Generator().manual_seed(P))
    flex, sdpa = (
        MicrobatchEngine(MicrobatchMajor(weights, attn_implementation=name), 100).row_losses(prompt, rows)
        for name in ("flex_attention", "sdpa")
    )
    assert flex == pytest.approx(sdpa, rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt_oss"])
@pytest.mark.parametrize("schedule", [DecoderSchedule, JointDecoderSchedule])
def test_gradient_of_a_decoder_with_the_variable_length_kernel(kind, schedule, varlen_on_cpu):
    base, start = (
        freeze(small_base(kind), torch.float32),
        torch.randn(6, 32, generator=torch.Generator().manual_seed(1)),
    )
    rows = random_examples(7, 30, seed=5)
    mean, truth = naive_gradient(base, start, rows)
    engine = MicrobatchEngine(schedule(base, torch.float32, attn_implementation="varlen"), 70)
    loss, gradient = gradient_of(engine, start, rows)
    assert loss == pytest.approx(mean, rel=1e-5) and relative(gradient, truth) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None], ids=str)
def test_on_cuda_queries_and_keys_have_autocasts_dtype(dtype):
    """Rotary embeddings in fp32 make them fp32, and the variable-length kernel takes half precision alone."""
    seen = []

    class Spy:
        def attend(self, module, q, k, v, options):
            seen.extend(t.dtype for t in (q, k, v))
            return torch.empty(3, N, D)

    with FakeTensorMode(), pretended_autocast(dtype):
        q, k, v = (torch.empty(1, heads, 3, D, device="cuda") for heads in (N, K, K))
        packed_attention(MODULE, q, k, v.to(dtype or v.dtype), None, packed_rows=Spy())
    assert seen == [dtype or torch.float32] * 3


@contextmanager
def pretended_autocast(dtype):
    """Autocast for CUDA, on a machine without it."""
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype is not None)
    torch.set_autocast_dtype("cuda", dtype or before)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)
