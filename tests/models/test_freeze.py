"""A frozen base: matrices in the compute dtype, with the logits that autocast would give, and all else in fp32."""

import copy

import pytest
import torch
from helpers.small_bases import small_base

from softprompt.models.loading import freeze, word_embeddings

BF16 = torch.bfloat16


@torch.no_grad()
def logits_of(base, dtype=BF16):
    rows = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        return base(inputs_embeds=rows, use_cache=False).logits


@pytest.mark.parametrize("stored", [torch.float32, BF16])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "llama4_text", "gemma3_text"])
def test_logits_under_autocast_are_those_of_a_base_in_fp32(kind, stored):
    base = small_base(kind).to(stored)
    base.set_experts_implementation("eager")  # its products are under autocast, as all others are
    wide = copy.deepcopy(base).float()
    frozen = freeze(copy.deepcopy(base), BF16)
    assert torch.equal(logits_of(frozen), logits_of(wide))
    assert torch.equal(logits_of(freeze(base, torch.float32), torch.float32), logits_of(wide, torch.float32))


def test_experts_in_one_product_are_as_near_to_the_truth_as_each_alone():
    base = small_base("mixtral")
    truth = logits_of(base, torch.float32)
    grouped = freeze(copy.deepcopy(base), BF16)
    base.set_experts_implementation("eager")
    each = freeze(base, BF16)
    errors = [(logits_of(one).float() - truth).norm() / truth.norm() for one in (grouped, each)]
    assert errors[0] < 2 * errors[1] < 0.1


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "llama4_text"])
def test_only_embeddings_norms_biases_and_routers_are_wide(kind):
    base = small_base(kind).to(BF16)
    embeddings = {id(module.weight) for module in base.modules() if isinstance(module, torch.nn.Embedding)}
    matrices = [n for n, p in base.named_parameters() if p.dim() > 1 and id(p) not in embeddings]
    frozen = dict(freeze(base, BF16).named_parameters())
    wide = {name for name in matrices if frozen[name].dtype != BF16}
    assert wide <= {name for name in matrices if "gate.weight" in name or "router" in name}
    assert all(frozen[name].dtype == torch.float32 for name in frozen if name not in matrices)
    assert word_embeddings(base).weight.dtype == torch.float32


@pytest.mark.parametrize("narrow", [torch.float8_e4m3fn, torch.int8])
def test_modules_with_quantized_weights_are_not_cast(narrow):
    base = small_base("llama").to(BF16)
    module = base.model.layers[0].mlp.up_proj
    module.weight = torch.nn.Parameter(module.weight.detach().to(narrow), requires_grad=False)
    module.weight_scale = torch.nn.Parameter(torch.ones(1, dtype=BF16))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    freeze(base, torch.float32)
    after = module.state_dict()
    assert all(after[name].dtype is tensor.dtype for name, tensor in before.items())
    assert all(torch.equal(after[name].float(), tensor.float()) for name, tensor in before.items())
    assert base.model.layers[1].mlp.up_proj.weight.dtype is torch.float32


def test_soft_caps_are_not_left_to_an_attention_that_lacks_them():
    """transformers 5.17 loads Gemma 2 with sdpa, and leaves its soft caps out there without a message."""
    for kind, expected in (("gemma2", "eager"), ("llama", "sdpa")):
        base = small_base(kind)
        base.config._attn_implementation = "sdpa"
        assert freeze(base, torch.float32).config._attn_implementation == expected
