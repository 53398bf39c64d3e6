"""The nearest words of runs that have not ended: the base's word embeddings are read from its files."""

import pytest
import torch
from helpers.bases import make_bloom
from helpers.small_bases import small_base
from safetensors.torch import save_file

from softprompt.prompt.nearest_tokens import embedding_space
from softprompt.report.nearest_words import _stored_embeddings
from softprompt.utils.errors import ModelError


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2", "gpt_neox", "opt", "mpt", "mixtral", "cohere"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_word_embeddings_of_any_decoder_are_found(kind, tied, tmp_path):
    base = small_base(kind, tie_word_embeddings=tied)
    base.save_pretrained(tmp_path)
    space = _stored_embeddings(str(tmp_path))
    assert torch.equal(space.words, base.get_input_embeddings().weight) and space.layernorm is None


def test_of_a_bloom_the_layer_norm_over_them_is_found_too(tmp_path):
    base = make_bloom(layer_norm_epsilon=1e-3)
    base.save_pretrained(tmp_path)
    found, expected = _stored_embeddings(str(tmp_path)), embedding_space(base)
    assert torch.equal(found.words, expected.words) and found.layernorm[2] == 1e-3
    assert all(torch.equal(a, b) for a, b in zip(found.layernorm[:2], expected.layernorm[:2], strict=True))


def test_a_base_whose_files_are_gone_is_named(tmp_path):
    small_base("llama").config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="are not on this machine"):
        _stored_embeddings(str(tmp_path))
    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lack model\.embed_tokens\.weight"):
        _stored_embeddings(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"only pytorch_model\.bin"):
        _stored_embeddings(str(tmp_path))
