"""Body and head of a base together are the base's own forward, or the base is refused."""

import math

import pytest
import torch
from helpers.packed_cases import relative
from helpers.peers import gradient_of, naive_gradient, random_examples
from helpers.small_bases import small_base
from transformers import LlamaForCausalLM

from softprompt.config.loader import train_config
from softprompt.engines.choice import choose_engine
from softprompt.engines.factory import packed_engine, padded_engine
from softprompt.engines.head import LinearHead, ModelHead
from softprompt.engines.probe import log_probability_error
from softprompt.engines.split_base import split_base
from softprompt.models.loading import freeze
from softprompt.utils.errors import ModelError

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)


class Changed(LlamaForCausalLM):
    """Changes the embeddings before the body: the split at `model` leaves that out."""

    factor, shift = 1.0, 0.0

    def forward(self, input_ids=None, inputs_embeds=None, position_ids=None, **others):
        words = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        changed = self.factor * words + self.shift
        return super().forward(inputs_embeds=changed, position_ids=position_ids, **others)


def changed(factor, shift):
    base = small_base("llama")
    base.__class__, base.factor, base.shift = Changed, factor, shift
    return base


@DTYPES
@pytest.mark.parametrize(("factor", "shift"), [(2.0, 0.0), (0.5, 0.0), (1.0, 0.5)])
def test_a_base_that_changes_embeddings_before_its_body_is_refused(factor, shift, dtype, tokenizer):
    base = freeze(changed(factor, shift), dtype)
    for engine in (packed_engine, lambda *args: padded_engine(base, tokenizer, dtype)):
        with pytest.raises(ModelError, match="differ from those of its own forward"):
            engine(base, dtype)
    config = train_config(model_name_or_path="x", dataset="x")
    with pytest.raises(ModelError, match="cannot be split into a body and a head"):
        choose_engine(config, base, tokenizer, dtype, torch.randn(3, 32), random_examples(5, 9))


@DTYPES
def test_a_base_that_only_passes_embeddings_on_is_not(dtype):
    assert split_base(freeze(changed(1.0, 0.0), dtype), dtype).body is not None


class ReadsItsBody(LlamaForCausalLM):
    """Takes a scale of the logits from its body, as Falcon-H1 does."""

    def forward(self, **given):
        out = super().forward(**given)
        out.logits = out.logits * self.model.logits_factor
        return out


@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_a_forward_may_read_settings_from_the_body(factor, tokenizer):
    base, start, rows = small_base("llama"), torch.randn(3, 32), random_examples(5, 9)
    base.__class__, base.model.logits_factor = ReadsItsBody, factor
    base, (mean, truth) = freeze(base, FP32), naive_gradient(base, start, rows)
    for engine in (packed_engine(base, FP32, 40), padded_engine(base, tokenizer, FP32, 40)):
        loss, gradient = gradient_of(engine, start, rows)
        assert loss == pytest.approx(mean, rel=1e-5) and relative(gradient, truth) < 1e-5


def test_a_module_that_the_forward_does_not_call_is_not_the_body(tokenizer):
    base, start, rows = small_base("llama"), torch.randn(3, 32), random_examples(5, 9)
    base._modules = {"draft": small_base("llama", seed=9).model, **base._modules}
    base, (mean, truth) = freeze(base, FP32), naive_gradient(base, start, rows)
    assert split_base(base, FP32).body is base.model
    for engine in (packed_engine(base, FP32, 40), padded_engine(base, tokenizer, FP32, 40)):
        loss, gradient = gradient_of(engine, start, rows)
        assert loss == pytest.approx(mean, rel=1e-5) and relative(gradient, truth) < 1e-5


@DTYPES
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])
def test_a_plain_head_is_fused_with_the_loss(kind, dtype):
    assert isinstance(split_base(freeze(small_base(kind), dtype), dtype).head, LinearHead)


@DTYPES
@pytest.mark.parametrize(
    ("kind", "scale"), [("cohere", {"logit_scale": 1.002}), ("granite", {"logits_scaling": 0.998})]
)
def test_a_scale_near_one_is_a_scale(kind, scale, dtype):
    assert isinstance(split_base(freeze(small_base(kind, **scale), dtype), dtype).head, ModelHead)


@DTYPES
@pytest.mark.parametrize("wrong", ["soft cap", "bias of a few words"])
def test_what_a_linear_head_would_leave_out_is_noticed(wrong, dtype):
    """Only large logits show a soft cap; only the base's own words show what concerns few of them."""
    base = small_base("llama", vocab_size=400)
    own = base.forward

    def forward(inputs_embeds=None, **others):
        out = own(inputs_embeds=inputs_embeds, **others)
        if wrong == "soft cap":
            out.logits = 300 * (out.logits / 300).tanh()
        else:
            out.logits = torch.cat([out.logits[..., :390], out.logits[..., 390:] - 30], dim=-1)
        return out

    base.forward = forward
    assert isinstance(split_base(freeze(base, dtype), dtype).head, ModelHead)


@DTYPES
@pytest.mark.parametrize("mask", [-math.inf, -1e9, torch.finfo(torch.float32).min], ids=str)
@pytest.mark.parametrize("changed", [None, "embeddings", "mask"])
def test_masked_words_do_not_hide_a_difference(changed, mask, dtype):
    """Some bases mask words, such as the tokens of images, in their logits."""
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[:, 3] = mask
    other = logits.clone()
    if changed == "embeddings":
        other[:, 7] += 1
    if changed == "mask":
        other[:, 3] = 0
    off, size = log_probability_error(other, logits)
    assert size < 20 and (off > 0.5 if changed else off == 0)
