"""A base without its layers is the base that transformers loads: the same tensors, buffers, ties and dtypes. What
cannot be read in parts is refused."""

import json

import pytest
import torch
from helpers.bases import make_bloom
from helpers.small_bases import small_base
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import conversion_mapping
from transformers.core_model_loading import Transpose, WeightConverter

from softprompt.models.decoder_layers import decoder_layers
from softprompt.models.loading import freeze, read_base
from softprompt.models.meta_loading import load_meta_model
from softprompt.utils.errors import ModelError
from softprompt.utils.fingerprints import fingerprint_of_base
from softprompt.utils.safetensors_io import ConcatenatedTensor, list_stored_tensors

KINDS = {
    "bloom": {},
    "llama": {},
    "gemma2": {},  # an embedding that scales
    "gemma3_text": {},  # two kinds of rotary frequencies
    "gpt2": {},  # Conv1D, no rotary frequencies
    "opt": {},  # the layers are those of a decoder within the body
    "mpt": {},
    "phi3": {},
    "gpt_oss": {},
    "mixtral": {"num_local_experts": 12},  # renamed and merged; 10 follows 9, not 1
    "qwen2_moe": {},
}


def stored(kind, folder, **others):
    base = make_bloom() if kind == "bloom" else small_base(kind, **KINDS[kind])
    base.to(others.get("dtype", torch.float32)).save_pretrained(folder, max_shard_size="40KB")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_transformers_loads(kind, dtype, tmp_path):
    whole = read_base(str(stored(kind, tmp_path, dtype=dtype)))
    base, layers = load_meta_model(str(tmp_path), "--shard_base")
    assert all(p.is_meta == (name in layers) for name, p in base.named_parameters()) and layers
    assert fingerprint_of_base(base, [], blocks=layers) == fingerprint_of_base(whole, [])
    buffers, expected = dict(base.named_buffers()), dict(whole.named_buffers())
    assert buffers.keys() == expected.keys()
    for name, buffer in buffers.items():
        assert buffer.dtype == expected[name].dtype and torch.equal(buffer, expected[name])
    names = [[n for n, _ in each.named_parameters()] for each in (base, whole)]  # without tied ones
    assert names[0] == names[1]
    dtypes = [{n: p.dtype for n, p in freeze(each, torch.bfloat16).named_parameters()} for each in (base, whole)]
    assert dtypes[0] == dtypes[1]


def test_a_head_that_is_stored_but_tied(tmp_path):
    """transformers ties it if it is stored with the values of the embeddings, and else not."""
    path = stored("gemma2", tmp_path)
    tensors = {n: t for file in path.glob("*.safetensors") for n, t in load_file(file).items()}
    for file in path.glob("model*"):
        file.unlink()
    for head in (tensors["model.embed_tokens.weight"].clone(), torch.randn(300, 32)):
        save_file({**tensors, "lm_head.weight": head}, path / "model.safetensors", {"format": "pt"})
        (base, _), whole = load_meta_model(str(path)), read_base(str(path))
        for each in (base, whole):
            assert torch.equal(each.lm_head.weight, head)
        tied = [each.lm_head.weight is each.model.embed_tokens.weight for each in (base, whole)]
        assert tied[0] == tied[1]


def test_a_conversion_that_cannot_be_read_in_parts(tmp_path, monkeypatch):
    stored("llama", tmp_path)
    rules = [WeightConverter("mlp.up_proj.weight", "mlp.up_proj.weight", [Transpose()])]
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda base: rules)
    said = r"--shard_base: .*up_proj.weight .*Transpose.*cannot be read in parts"
    with pytest.raises(ModelError, match=said) as told:
        load_meta_model(str(tmp_path), "--shard_base")
    assert "\n" not in str(told.value)


def test_a_missing_expert(tmp_path):
    stored("mixtral", tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    name = next(n for n in index if "layers.1" in n and "experts.5.w2" in n)
    path = tmp_path / index[name]
    save_file({n: t for n, t in load_file(path).items() if n != name}, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"layers.1.mlp.experts.down_proj has the shape \[11, 32, 64\], but .* \[12,"):
        load_meta_model(str(tmp_path))


def test_layers_that_cannot_be_found_or_sharded():
    def refused(base):
        with pytest.raises(ModelError, match=r"--shard_base: .*; leave it out") as told:
            decoder_layers(base, "--shard_base")
        return str(told.value)

    base = small_base("llama")
    assert decoder_layers(base, "--shard_base").name == "model.layers"
    base.model.layers[1].mlp.up_proj = base.model.layers[0].mlp.up_proj
    assert "LlamaForCausalLM has layers that share parameters" in refused(base)
    base.model.layers[1] = base.model.layers[0]
    assert "share parameters" in refused(base)
    base = small_base("llama")
    base.model.layers[1].scale = nn.Parameter(torch.tensor(1.0))
    assert "without dimensions" in refused(base)
    base.model.more = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
    assert "has 2 lists of 2 layers" in refused(base)
    base.model.layers, base.model.more = nn.Sequential(*base.model.layers), None
    assert "has 0 lists of 2 layers" in refused(base)


def test_a_part_of_concatenated_tensors(tmp_path):
    values = [torch.randn(n, 3) for n in (2, 1, 4)]
    save_file({str(i): t for i, t in enumerate(values)}, tmp_path / "model.safetensors")
    parts = [list_stored_tensors(tmp_path)[str(i)] for i in range(3)]
    whole, expected = ConcatenatedTensor(parts, (7, 3)), torch.cat(values).flatten()
    for first in range(22):
        for last in range(first, 22):
            part = torch.full((last - first,), torch.nan)
            whole.read_into(part, first)
            assert torch.equal(part, expected[first:last])
    assert torch.equal(whole.bytes(5, 80), expected.view(torch.uint8)[5:80])
