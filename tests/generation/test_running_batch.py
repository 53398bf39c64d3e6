"""Requests that join and leave a running batch, with every generator."""

import gc
import weakref

import pytest
import torch
from helpers.bases import make_bloom
from helpers.peers import generator_of, greedy_alone
from helpers.small_bases import small_base

from softprompt.generation.decoder_generator import DecoderGenerator
from softprompt.generation.requests import GenerationSettings, Request
from softprompt.models.loading import freeze

KINDS = ["bloom", "llama", "transformers"]


def make(kind, tokenizer):
    """A frozen base and its generator."""
    base = freeze(small_base("llama", seed=1) if kind == "llama" else make_bloom(seed=2), torch.float32)
    if kind == "llama":
        return base, DecoderGenerator(base, tokenizer, torch.float32, only=True)
    return base, generator_of("packed" if kind == "bloom" else "padded", base, tokenizer)


ENDLESS = (10**6,)  # no token ends an answer


def asked(n, new_tokens, seed=0, ends=()):
    draw = torch.Generator().manual_seed(seed)
    settings = [
        GenerationSettings(max_new_tokens=new_tokens + i % 3, do_sample=False, eos_token_id=ends) for i in range(n)
    ]
    prompts = [None, *(torch.randn(P, 32, generator=draw) for P in (1, 5, 40))]
    texts = [torch.randint(4, 300, (1 + 3 * i % 11,), generator=draw).tolist() for i in range(n)]
    return [Request(text, one, prompts[i % 4]) for i, (text, one) in enumerate(zip(texts, settings, strict=True))]


def expected_of(base, request):
    settings = request.settings
    ends = settings.eos_token_id or (2,)
    return greedy_alone(base, request.input_ids, request.prompt, settings.max_new_tokens, ends)


@pytest.mark.parametrize("kind", KINDS)
def test_requests_that_join_later_get_the_answers_that_they_get_alone(kind, tokenizer):
    """More and longer requests than the cache was made for, so that it grows while answers are running."""
    base, generator = make(kind, tokenizer)
    batch, tokens, ended, requests = generator.new_batch(4), {}, [], {}
    later = [asked(1, 4), [], asked(2, 7, seed=1), asked(5, 6, seed=2), [], [], asked(1, 30, seed=3)]
    while batch or later:
        for state, request in zip(batch.add(some := later.pop(0)), some, strict=True) if later else ():
            requests[state], tokens[state] = request, []
        ended += batch.step(lambda state, token: tokens[state].append(token))
    assert len(ended) == len(requests) == 9
    for state, request in requests.items():
        assert state.answer_ids == tokens[state] == expected_of(base, request)
        assert state.finish_reason == ("length" if len(state.answer_ids) == request.settings.max_new_tokens else "stop")


@pytest.mark.parametrize("kind", ["bloom", "llama"])
def test_a_canceled_request_leaves_at_the_next_step(kind, tokenizer):
    base, generator = make(kind, tokenizer)
    batch, ended = generator.new_batch(2), []
    first, second, third, fourth = batch.add(requests := asked(4, 9, ends=ENDLESS))
    seen = []
    for _ in range(2):
        batch.step(lambda state, token: seen.append(state))
    assert set(seen) == {first, second}
    first.cancel()
    third.cancel()  # it waits for a slot, which goes to the one behind it
    seen.clear()
    batch.step(lambda state, token: seen.append(state))
    assert set(seen) == {second, fourth} and first.finish_reason is None
    while batch:
        ended += batch.step(lambda state, token: None)
    assert set(ended) == {second, fourth}
    assert [s.answer_ids for s in (second, fourth)] == [expected_of(base, requests[1]), expected_of(base, requests[3])]


def test_transformers_stops_when_all_are_canceled(tokenizer):
    _, generator = make("transformers", tokenizer)
    batch, count = generator.new_batch(2), []
    states = batch.add([Request([5, 6], GenerationSettings(max_new_tokens=50, eos_token_id=ENDLESS))] * 2)

    def cancel(state, token):
        count.append(token)
        for each in states:
            each.cancel()

    while batch:
        batch.step(cancel)
    assert len(count) <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_finished_requests_are_released(kind, tokenizer):
    _, generator = make(kind, tokenizer)
    batch = generator.new_batch(2)
    states = batch.add(asked(5, 3))
    states[4].cancel()
    known = [weakref.ref(state) for state in states]
    del states
    while batch:
        batch.step(lambda state, token: None)
    gc.collect()
    assert not any(ref() for ref in known)


@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_are_recorded_where_they_are_wanted(kind, tokenizer):
    base, generator = make(kind, tokenizer)
    settings = GenerationSettings(max_new_tokens=3, temperature=0.5, top_k=2, eos_token_id=ENDLESS)
    batch = generator.new_batch(3)
    states = batch.add([Request([5, 6, 7], settings, top_logprobs=number, seed=3) for number in (None, 0, 4)])
    while batch:
        batch.step(lambda state, token: None)
    assert [len(state.logprobs) for state in states] == [0, 3, 3]
    row = [5, 6, 7]
    for one in states[2].logprobs:
        with torch.no_grad():
            scores = base(torch.tensor([row])).logits[0, -1].log_softmax(-1)
        assert one.logprob == pytest.approx(scores[one.token].item(), abs=1e-3)
        assert [token for token, _ in one.top] == scores.topk(4).indices.tolist()
        row.append(one.token)
    assert row[3:] == states[2].answer_ids == states[1].answer_ids
