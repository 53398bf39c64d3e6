"""What no machine of ours can run, a window on another device than the CPU, played on torch's "meta" device, which has
shapes and no numbers: no operator mixes devices, and none makes the host wait for a number inside a window."""

import pytest
import torch
from helpers.small_bases import small_base
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, BloomForCausalLM

from softprompt import mini
from softprompt.data.tokenization import Example
from softprompt.engines import head
from softprompt.engines import linear_cross_entropy as loss
from softprompt.engines.bloom_schedule import MicrobatchMajor
from softprompt.engines.factory import packed_engine, padded_engine
from softprompt.engines.layer_major import LayerMajor
from softprompt.engines.microbatch_engine import MicrobatchEngine
from softprompt.models.bloom_weights import ResidentWeights
from softprompt.models.loading import freeze, load_tokenizer
from softprompt.prompt.soft_prompt import PromptEmbedding

WAITING = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.masked_select")
LENGTHS = (20, 19, 17, 9, 3, 1)
ROWS = [Example([*range(4, 4 + n)], [-100] * (n // 3) + [*range(4 + n // 3, 4 + n)]) for n in LENGTHS]
ROWS.append(Example([5, 6], [5, 6]))  # a target without a predictor in the text


class Watching(TorchDispatchMode):
    """Raises where an operator takes tensors of two devices (but for scalars and copies), or waits for a number."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        devices = {t.device.type for t in tensors if t.ndim}
        assert len(devices) < 2 or "copy" in str(operator), f"{operator} mixes {devices}"
        waits = str(operator).startswith(WAITING) and any(t.device.type == "meta" for t in tensors)
        assert not waits, f"{operator} waits for the device"
        return operator(*args, **(kwargs or {}))


def engine_of(kind, dtype, tmp_path):
    base = freeze(BloomForCausalLM(AutoConfig.from_pretrained(mini.BASE_DIR)), dtype)
    if kind == "padded":
        return moved_to_meta(padded_engine(base, load_tokenizer(str(mini.BASE_DIR)), dtype, 64))
    weights = ResidentWeights(base.to("meta"), dtype)
    if kind == "layer by layer":
        return MicrobatchEngine(LayerMajor(weights, 1 << 30, tmp_path), 64)
    return MicrobatchEngine(MicrobatchMajor(weights, kind == "recomputed"), 64)


def moved_to_meta(engine):
    """An engine that was made on the CPU, where its head could be examined."""
    schedule = engine.schedule
    schedule.base.to("meta")
    engine.device = schedule.device = schedule.head.device = torch.device("meta")
    if getattr(schedule.head, "weight", None) is not None:
        schedule.head.weight = torch.nn.Parameter(schedule.head.weight.to("meta"), requires_grad=False)
    return engine


def decoder_engine(kind, dtype, attn_implementation):
    """The packed engine of a decoder. Its attention modules and its head were examined on the CPU."""
    engine = packed_engine(freeze(small_base(kind), dtype), dtype, 64, attn_implementation=attn_implementation)
    assert engine.schedule.layout
    return moved_to_meta(engine)


def like_cuda(monkeypatch):
    for sizes in (loss.BLOCK_ELEMENTS, head.CHUNK_ELEMENTS):
        monkeypatch.setitem(sizes, "meta", sizes["cuda"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["packed", "recomputed", "layer by layer", "padded"])
def test_a_window_stays_on_its_device_and_never_waits(kind, dtype, tmp_path, monkeypatch):
    like_cuda(monkeypatch)
    engine = engine_of(kind, dtype, tmp_path)
    prompt = PromptEmbedding(torch.zeros(10, 128)).to("meta")
    with Watching():
        total, targets = engine.accumulate(prompt, ROWS, torch.ones((), device="meta"))
        evaluated, _ = engine.evaluate(prompt.weight.detach(), ROWS)
    assert {t.device.type for t in (total, evaluated, prompt.weight.grad)} == {"meta"} and targets == 50
    assert prompt.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gpt2"])
@pytest.mark.parametrize("attn_implementation", ["sdpa", "varlen"])
def test_so_does_a_window_of_any_decoder(kind, dtype, attn_implementation, monkeypatch):
    like_cuda(monkeypatch)
    engine, prompt = decoder_engine(kind, dtype, attn_implementation), PromptEmbedding(torch.zeros(10, 32)).to("meta")
    with Watching():
        total, targets = engine.accumulate(prompt, ROWS, torch.ones((), device="meta"))
        evaluated, _ = engine.evaluate(prompt.weight.detach(), ROWS)
    assert {t.device.type for t in (total, evaluated, prompt.weight.grad)} == {"meta"} and targets == 50


def test_the_watch_sees_what_it_is_for():
    with Watching(), pytest.raises(AssertionError, match="mixes"):
        torch.ones(2, device="meta") + torch.ones(2)
    with Watching(), pytest.raises(AssertionError, match="waits"):
        torch.ones(2, device="meta").nonzero()
