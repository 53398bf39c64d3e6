"""A frozen base: matrices in the compute dtype, with the logits that autocast would give, and all else in fp32."""

import copy

import pytest
import torch
from helpers.small_bases import small_base
from transformers import BitsAndBytesConfig

from softprompt import SoftPromptModel
from softprompt.models.loading import freeze, word_embeddings
from softprompt.utils.errors import ModelError

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


def test_a_base_that_was_loaded_quantized_is_refused(tiny_base, tokenizer):
    from transformers import BloomForCausalLM
    from transformers.quantizers import AutoHfQuantizer

    base = BloomForCausalLM.from_pretrained(tiny_base)
    base.hf_quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(load_in_8bit=True))
    with pytest.raises(ModelError, match=r"stored quantized \(bitsandbytes\).*--load_in_4bit"):
        freeze(base, torch.float32)
    with pytest.raises(ModelError, match="stored quantized"):
        SoftPromptModel(base, tokenizer, None)
