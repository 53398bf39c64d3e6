"""Nearest tokens against a reference in plain loops, and the embedding space against the base's own layer norm."""

from types import SimpleNamespace

import pytest
import torch
from helpers.bases import make_bloom
from torch.nn import functional as F

from softprompt.models.loading import freeze
from softprompt.prompt import nearest_tokens as nearest_tokens_module
from softprompt.prompt.nearest_tokens import (
    EmbeddingSpace,
    cosine_matrix,
    embedding_space,
    nearest_tokens,
    random_vectors,
    readable_tokens,
)


def reference(words, layernorm, vectors, k):
    """Compare one vector with one word at a time, in fp64."""
    found = []
    for vector in vectors.double():
        cosines = []
        for word in words.double():
            a, b = layernorm(vector), layernorm(word)
            cosines.append((a @ b / (a.norm() * b.norm())).item())
        best = sorted(range(len(cosines)), key=lambda i: -cosines[i])[:k]
        found.append([(i, cosines[i]) for i in best])
    return found


@pytest.mark.parametrize("chunk", [1, 37, 10_000])
@pytest.mark.parametrize("V, H, P, k, dtype", [(53, 7, 3, 5, torch.float32), (11, 4, 1, 20, torch.bfloat16)])
@pytest.mark.parametrize("normed", [True, False])
def test_nearest_tokens_equal_the_reference(normed, V, H, P, k, dtype, chunk, monkeypatch):
    monkeypatch.setattr(nearest_tokens_module, "CHUNK_VALUES", chunk * H)
    torch.manual_seed(V)
    words, vectors = torch.randn(V, H).to(dtype), torch.randn(P, H)
    weight, bias = 1 + 0.5 * torch.randn(H), torch.randn(H)

    def layernorm(x):
        return F.layer_norm(x, (H,), weight.double(), bias.double(), 1e-5) if normed else x

    ids, cosines = nearest_tokens(EmbeddingSpace(words, (weight, bias, 1e-5) if normed else None), vectors, k)
    expected = reference(words, layernorm, vectors, k)
    assert ids.tolist() == [[i for i, _ in row] for row in expected]
    assert torch.allclose(cosines.double(), torch.tensor([[c for _, c in row] for row in expected]).double(), atol=1e-6)


def test_rows_beyond_the_vocabulary_are_not_found():
    words = torch.eye(6)
    ids, _ = nearest_tokens(EmbeddingSpace(words, None), torch.tensor([[0.0, 0, 0, 0.1, 0, 1]]), 2, vocab_size=5)
    assert ids[0, 0] == 3 and 5 not in ids


def test_the_space_is_after_blooms_layer_norm():
    base = freeze(make_bloom(), torch.float32)
    prompt = torch.randn(4, 32)
    with torch.no_grad():
        behind = base.transformer.word_embeddings_layernorm(prompt)
    expected = F.cosine_similarity(behind[:, None], behind[None], dim=-1)
    found = cosine_matrix(embedding_space(base), prompt)
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(found, F.cosine_similarity(prompt[:, None], prompt[None], dim=-1), atol=1e-2)
    ids, cosines = nearest_tokens(embedding_space(base), base.get_input_embeddings().weight[[7, 200]], 1)
    assert ids[:, 0].tolist() == [7, 200] and torch.allclose(cosines, torch.ones(2, 1))


def test_random_vectors_are_fixed_and_leave_the_rng_state_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    space = EmbeddingSpace(torch.randn(400, 64, generator=torch.Generator().manual_seed(1)), None)
    assert torch.equal(random_vectors(space), random_vectors(space)) and torch.equal(torch.get_rng_state(), before)
    assert 0.2 < nearest_tokens(space, random_vectors(space), 1)[1].mean() < 0.6  # about sqrt(2 ln V / H)


def test_tokens_are_readable(tokenizer):
    ids = tokenizer("我 a\n")["input_ids"]
    told = readable_tokens(tokenizer, [*ids, tokenizer.eos_token_id])
    assert told[-1] == "</s>" and all(word and word == word.strip() for word in told)
    assert any("␣" in word for word in told) and any("⏎" in word for word in told)


def test_bytes_of_a_character_are_shown_as_bytes(tokenizer):
    symbols = {
        bytes([byte]): tokenizer.convert_ids_to_tokens(tokenizer(chr(byte))["input_ids"][0]) for byte in (33, 65)
    }
    assert symbols == {b"!": "!", b"A": "A"}
    for text in ("鑫", "é"):  # none of them is a word of this tokenizer
        ids = tokenizer(text)["input_ids"]
        assert readable_tokens(tokenizer, ids) == [f"<0x{byte:02X}>" for byte in text.encode()]
    assert readable_tokens(
        SimpleNamespace(decode=lambda ids: "\ufffd", convert_ids_to_tokens=lambda id: "Ġç¬"), [0]
    ) == ["␣<0xE7><0xAC>"]
    assert readable_tokens(
        SimpleNamespace(decode=lambda ids: "\ufffd", convert_ids_to_tokens=lambda id: "▁<0xE7>"), [0]
    ) == ["▁<0xE7>"]
