"""Layer by layer is the packed engine's result to the bit, from wherever the layers come and wherever store go."""

import os

import pytest
import torch
from helpers.bases import make_bloom
from helpers.packed_cases import BASES, BF16, FP32, FP64, ROWS, ours, prompt_like, relative
from helpers.peers import naive_loss, random_examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from softprompt.data.tokenization import Example
from softprompt.engines.activation_offload import ActivationStore
from softprompt.engines.bloom_schedule import MicrobatchMajor
from softprompt.engines.layer_major import LayerMajor
from softprompt.engines.microbatch_engine import MicrobatchEngine
from softprompt.models.bloom_weights import ResidentWeights
from softprompt.models.loading import freeze
from softprompt.models.meta_loading import load_meta_model
from softprompt.models.weight_offload import StreamedWeights
from softprompt.utils.errors import TrainingError

SOME = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
EMPTY = Example([5, 6, 7], [-100] * 3)


def row_major(base, dtype=FP32, tokens=64):
    return MicrobatchEngine(MicrobatchMajor(ResidentWeights(base, dtype), gradient_checkpointing=True), tokens)


def layer_major(weights, folder, tokens=64, max_bytes=1 << 30):
    return MicrobatchEngine(LayerMajor(weights, max_bytes, folder), tokens)


def stream(folder, dtype=FP32):
    base, blocks = load_meta_model(str(folder))
    return StreamedWeights(freeze(base, dtype), blocks, dtype)


def alike(engine, other, values, rows):
    mean, gradient = ours(engine, values, rows)
    again, same = ours(other, values, rows)
    assert mean == again and torch.equal(gradient, same)
    for prompt in (values, None):
        total, count = engine.evaluate(prompt, rows)
        assert (total.item(), count) == (other.evaluate(prompt, rows)[0].item(), other.evaluate(prompt, rows)[1])
        assert engine.row_losses(prompt, rows) == other.row_losses(prompt, rows)


@SOME
@given(BASES, ROWS, st.integers(1, 40), st.integers(1, 90), st.sampled_from([0, 700, 1 << 30]), st.booleans())
def test_every_bit_of_loss_and_gradient(tmp_path_factory, base, rows, P, tokens, max_bytes, bf16):
    dtype = BF16 if bf16 else FP32
    values, base = prompt_like(base, P), freeze(base, dtype)
    engine = layer_major(ResidentWeights(base, dtype), tmp_path_factory.getbasetemp(), tokens, max_bytes)
    alike(engine, row_major(base, dtype, tokens), values, [*rows, EMPTY])


def test_the_plain_forward_in_double_precision(tmp_path):
    base, rows = make_bloom(n_layer=3).double().requires_grad_(False), random_examples(6, 12)
    values = prompt_like(base, 5)
    alike(layer_major(ResidentWeights(base, FP64), tmp_path, 20), row_major(base, FP64, 20), values, rows)


@pytest.mark.parametrize("P", [1, 100])
@pytest.mark.parametrize("shards", ["10GB", "30KB"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stored, dtype", [(FP32, FP32), (BF16, FP32), (BF16, BF16), (torch.float16, BF16)])
def test_from_files(P, shards, tied, stored, dtype, tmp_path):
    base = make_bloom(n_layer=4, tie_word_embeddings=tied).to(stored)
    base.save_pretrained(tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "30KB")
    base, rows = freeze(base, dtype), [*random_examples(9, 17), EMPTY]
    values = torch.randn(P, 32, generator=torch.Generator().manual_seed(P))
    alike(layer_major(stream(tmp_path, dtype), tmp_path, 40, 0), row_major(base, dtype, 40), values, rows)


def test_against_the_naive_forward(tiny_base, tmp_path):
    weights, rows = stream(tiny_base), random_examples(7, 15)
    base = freeze(make_bloom(), FP32)
    values = prompt_like(base, 6).requires_grad_()
    expected = naive_loss(base, values, rows)
    expected.backward()
    mean, gradient = ours(layer_major(weights, tmp_path, 30, 1000), values.detach(), rows)
    assert mean == pytest.approx(expected.item(), rel=1e-5)
    assert relative(gradient, values.grad) < 1e-5


def test_a_window_without_targets(tiny_base, tmp_path):
    engine, values = layer_major(stream(tiny_base), tmp_path), torch.randn(3, 32)
    for rows in ([EMPTY], [Example([9], [9])], [Example([9], [9]), EMPTY]):
        alike(engine, row_major(freeze(make_bloom(), FP32)), values, rows)


@pytest.fixture
def reads(monkeypatch):
    """Bytes that were read from files."""
    counts, real = [], os.preadv

    def preadv(descriptor, views, offset):
        counts.append(real(descriptor, views, offset))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", preadv)
    return counts


@pytest.mark.parametrize("L", [1, 2, 3, 6])
def test_a_window_reads_each_block_once_there_and_once_back(L, reads, tmp_path):
    """However many micro-batches it has; and the last two are still there on the way back, the first two afterwards."""
    base = make_bloom(n_layer=L)
    base.save_pretrained(tmp_path)
    engine = layer_major(stream(tmp_path), tmp_path, tokens=15)
    block = sum(p.nbytes for p in base.transformer.h[0].parameters())
    reads.clear()
    for window in range(3):
        ours(engine, torch.randn(4, 32), random_examples(8, 12, seed=window))
        blocks, rest = divmod(sum(reads), block)
        assert rest == 0 and blocks == max(L, 2 * L - 2) - (min(L, 2) if window else 0)
        reads.clear()
    engine.evaluate(None, random_examples(8, 12))
    assert sum(reads) == block * max(0, L - 2)


def test_no_more_than_two_blocks_are_held(tmp_path):
    make_bloom(n_layer=7).save_pretrained(tmp_path)
    weights = stream(tmp_path)
    places = {layer.dense_h_to_4h.weight.data_ptr() for layer in weights.iter_layers([*range(7), *reversed(range(7))])}
    assert len(places) == 2 and weights.extra_bytes == 2 * sum(
        p.nbytes for p in make_bloom().transformer.h[0].parameters()
    )


def test_out_of_memory_cuts_finer_and_begins_anew(tiny_base, tmp_path, capsys):
    weights = stream(tiny_base)
    rows, values = random_examples(9, 12), torch.randn(3, 32)
    expected, gradient = ours(row_major(freeze(make_bloom(), FP32), tokens=25), values, rows)
    plenty = weights.embed

    def embed(ids):
        if len(ids) > 25:
            raise torch.OutOfMemoryError("CUDA out of memory (as a test has it)")
        return plenty(ids)

    weights.embed = embed
    engine = layer_major(weights, tmp_path, 100, 0)
    mean, same = ours(engine, values, rows)
    assert mean == expected and torch.equal(same, gradient) and engine.tokens_per_microbatch == 25
    assert "out of memory" in capsys.readouterr().err


def test_store_are_given_back_as_they_were(tmp_path):
    draw = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(n % 5, 3, generator=draw, dtype=FP64 if n % 2 else FP32) for n in range(20)}
    with ActivationStore(200, tmp_path) as store:
        for _ in range(3):
            for n, tensor in tensors.items():
                store.put(n, tensor)
            size = os.fstat(store._file.fileno()).st_size
            for n, tensor in reversed(tensors.items()):
                assert torch.equal(store.get(n), tensor) and torch.equal(store.pop(n), tensor)
        assert os.fstat(store._file.fileno()).st_size == size and store._bytes == 0
        assert not list(tmp_path.iterdir()), "the file has a name"


def test_no_place_for_store(tmp_path):
    (tmp_path / "file").touch()
    with (
        ActivationStore(0, tmp_path / "file") as store,
        pytest.raises(TrainingError, match=r"--offload_folder .*file: activations cannot be stored"),
    ):
        store.put(1, torch.ones(3))
