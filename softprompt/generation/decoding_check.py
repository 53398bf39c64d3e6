"""The check that continuous batching gives a base's own logits.

Two texts are prefilled in one step and continued by decoding steps, first without a prompt, then again with the same
prompt before both. The logits of these steps are compared with those of the base's own forward over the whole rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.data.collate import Batch
from softprompt.engines.check_cache import cache_result, cached_result, result_key
from softprompt.engines.padded import padded_forward
from softprompt.engines.self_check import CheckResult
from softprompt.generation.continuous_batching import StepModel
from softprompt.generation.cuda_graphs import with_graphs
from softprompt.generation.packed_step import PackedStep, Slot
from softprompt.generation.requests import GenerationSettings, Request
from softprompt.generation.sampling import RequestState
from softprompt.models.loading import word_embeddings
from softprompt.models.precision import autocast
from softprompt.utils.errors import ModelError
from softprompt.utils.out_of_memory import reason_or_raise

P, SHORT, STEPS = 3, 5, 3  # virtual tokens, tokens of the shorter text, compared steps (the first is the prefill)
FIRST_LENGTH = 20  # tokens of the longer text behind the prompt, in the first check of a base


def check_decoding(model: StepModel, base: PreTrainedModel, dtype: torch.dtype, longest: int = FIRST_LENGTH) -> None:
    """Check the logits of rows of up to `longest` tokens. A check that passed is cached, as in `self_check`.

    Raises:
        ModelError: The logits differ, or cannot be computed.
    """
    if model.max_positions is not None:
        longest = max(SHORT, min(longest, model.max_positions - P - STEPS))
    key = result_key(base, model.device, dtype, P, "decoding")
    if cached_result(key, longest):
        return
    if failure := _difference(model, base, dtype, longest):
        raise ModelError(f"{type(base).__name__}: {failure}")
    cache_result(key, CheckResult(2, longest, 0.0, 0.0))


@torch.inference_mode()
def _difference(model: StepModel, base: PreTrainedModel, dtype: torch.dtype, longest: int) -> str | None:
    """Return how the logits differ, or why the step model cannot compute them; None if they agree within the rounding
    of `dtype`. `longest` is the number of tokens of the longer text."""
    embed = word_embeddings(base)
    prompt = embed(torch.arange(P, device=model.device) % embed.num_embeddings).float()
    for values, lengths in ((None, (SHORT, 2 * SHORT)), (prompt, (SHORT, longest))):
        texts = [[(7 * i + length) % embed.num_embeddings for i in range(length + STEPS)] for length in lengths]
        try:
            ours = _logits_of_steps(model, texts, values)
        except Exception as error:  # models that are called in an unexpected way may raise any exception
            return reason_or_raise(error)
        expected = torch.stack([_own_logits(base, dtype, text, values) for text in texts])  # [2, STEPS, V]
        off, size = (ours - expected).abs().max().item(), expected.abs().max().item()
        if not off <= (1e-3 if dtype.itemsize >= 4 else 5e-2) * size:
            return f"logits of decoding steps differ by {off:.2g}; the largest is {size:.2g}"
    return None


def _logits_of_steps(model: StepModel, texts: Sequence[Sequence[int]], prompt: Tensor | None) -> Tensor:
    """Return the logits [2, STEPS, V] fp32 of the prefill and of the decoding steps after it."""
    settings, prefix = GenerationSettings(max_new_tokens=STEPS, do_sample=False), model.run_prompt(prompt)
    slots = []
    for index, text in enumerate(texts):
        request = Request(text[: len(text) - STEPS], settings, prompt)
        slots.append(Slot(RequestState(index, request, frozenset(), None), prefix))
    forward = with_graphs(model.forward, model.device, capture_at=1)
    cache, logits = model.new_cache(len(slots), P + max(map(len, texts)), prefix), []
    for number in range(STEPS):
        step = PackedStep.of(slots, model.device)
        logits.append(forward(cache, step).float().clone())
        for slot, text in zip(slots, texts, strict=True):
            slot.cached = slot.length
            slot.state.append(text[len(text) - STEPS + number])
    return torch.stack(logits, dim=1)


def _own_logits(base: PreTrainedModel, dtype: torch.dtype, text: Sequence[int], prompt: Tensor | None) -> Tensor:
    """Return the base's own logits of one text at the same positions: [STEPS, V] fp32."""
    weight = word_embeddings(base).weight
    ids = torch.tensor([text[:-1]], device=weight.device)  # what the last token predicts is not compared
    with autocast(weight.device, dtype):
        before, batch = weight[:0] if prompt is None else prompt, Batch(ids, *[torch.ones_like(ids)] * 2)
        logits, _ = padded_forward(base, before, batch, last=STEPS)
    return logits[0, -STEPS:].float()
