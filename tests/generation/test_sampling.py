"""From logits to tokens: transformers' own processors in their order, and one random number generator per answer."""

import math

import pytest
import torch
from helpers.bases import make_bloom
from helpers.peers import answers_of, generator_of
from transformers import LogitsProcessor, LogitsProcessorList

from softprompt.generation.generator import in_request_order
from softprompt.generation.hf_generate import beam_search
from softprompt.generation.requests import GenerationSettings, Request, sample_seed
from softprompt.generation.sampling import process_logits, sample
from softprompt.models.loading import freeze

FP32 = torch.float32
SETTINGS = [
    {},
    {"temperature": 0.7},
    {"top_k": 0},
    {"top_k": 7, "top_p": 0.8},
    {"top_k": 0, "top_p": 0.5, "min_p": 0.1},
    {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    {"suppress_tokens": (5, 6, 7), "temperature": 2.0, "min_p": 0.3, "repetition_penalty": 0.8},
    {"do_sample": False, "repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "suppress_tokens": (9,), "top_k": 2},
]


class KnownLogits(LogitsProcessor):
    """Replaces the model's logits by known ones."""

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, input_ids, scores):
        return self.logits.clone()


@pytest.mark.parametrize("given", SETTINGS, ids=str)
def test_processed_logits_equal_those_of_transformers(given):
    base = make_bloom()
    settings = GenerationSettings(**given)
    ids = torch.tensor([[8, 9, 8, 5, 9, 8], [4, 4, 4, 4, 4, 4]])
    logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(0)) * 4
    shape = {n: getattr(settings, n) for n in ("temperature", "top_k", "top_p", "min_p")} if settings.do_sample else {}
    asked = {
        "max_new_tokens": 1,
        "do_sample": settings.do_sample,
        "repetition_penalty": settings.repetition_penalty,
        "no_repeat_ngram_size": settings.no_repeat_ngram_size,
        "suppress_tokens": list(settings.suppress_tokens) or None,
        "output_scores": True,
        "return_dict_in_generate": True,
        "pad_token_id": 3,
        "eos_token_id": 2,
        **shape,
    }
    out = base.generate(ids, logits_processor=LogitsProcessorList([KnownLogits(logits)]), **asked)
    # KnownLogits comes after the penalties in transformers' list, so those are taken from the model's own logits
    if settings.repetition_penalty != 1.0 or settings.no_repeat_ngram_size or settings.suppress_tokens:
        out = base.generate(ids, output_logits=True, **asked)
        logits = out.logits[0]
    mine = process_logits(logits, ids.tolist(), settings)
    assert torch.equal(mine, out.scores[0])


def test_samples_follow_the_distribution():
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    n = 20_000
    tokens = sample(probabilities.expand(n, -1), [torch.Generator().manual_seed(seed) for seed in range(n)])
    shares = torch.bincount(torch.tensor(tokens), minlength=6) / n
    for share, p in zip(shares.tolist(), probabilities.tolist(), strict=True):
        assert abs(share - p) <= 4 * math.sqrt(p * (1 - p) / n)


def test_a_certain_token_is_sampled():
    for at in (0, 2, 4):
        row = torch.zeros(1, 5)
        row[0, at] = 1
        assert sample(row, [torch.Generator()]) == [at]


def test_seeds_depend_on_the_question_and_the_sample():
    seeds = {sample_seed(s, n, k) for s in range(3) for n in range(10) for k in range(4)}
    assert len(seeds) == 120 and all(0 <= seed < 2**64 for seed in seeds)
    assert sample_seed(1, 2, 3) == sample_seed(1, 2, 3) and sample_seed(1, 2, 3) != sample_seed(1, 23)


KINDS = pytest.mark.parametrize("kind", ["packed", "padded"])


@KINDS
def test_end_tokens_of_the_settings(kind, tokenizer):
    """Requests of one batch with one end token and with several, in place of the tokenizer's."""
    base, text = freeze(make_bloom(seed=2), FP32), [9, 8, 7]
    distinct = {"max_new_tokens": 9, "do_sample": False, "no_repeat_ngram_size": 1}
    (whole,) = answers_of(kind, base, tokenizer, [(text, None)], GenerationSettings(**distinct, eos_token_id=(0,)))
    assert len(whole) == len(set(whole)) == 9
    ends = [(whole[3],), (0, whole[5], whole[7]), (0,)]
    requests = [Request(text, GenerationSettings(**distinct, eos_token_id=e)) for e in ends]
    answers = list(in_request_order(generator_of(kind, base, tokenizer).generate(requests)))
    assert answers == [whole[:3], whole[:5], whole]


@KINDS
def test_a_stop_string_ends_an_answer_and_stays_in_it(kind, tokenizer):
    base, text, words = freeze(make_bloom(seed=2), FP32), tokenizer("hello")["input_ids"], tokenizer("ok")["input_ids"]
    greedy = {"max_new_tokens": 9, "do_sample": False, "no_repeat_ngram_size": 1, "eos_token_id": (0,)}
    (whole,) = answers_of(kind, base, tokenizer, [(text, None)], GenerationSettings(**greedy))
    written = [tokenizer.decode(whole[: n + 1]) for n in range(9)]
    stop = next(t for t in (tokenizer.decode([token]) for token in whole[2:]) if t.strip() and "\ufffd" not in t)
    at = next(n for n, t in enumerate(written) if stop in t)
    asked = [(text, None), (words, None), (text, torch.randn(3, 32, generator=torch.Generator().manual_seed(1)))]
    plain = answers_of(kind, base, tokenizer, asked, GenerationSettings(**greedy))
    answers = answers_of(kind, base, tokenizer, asked, GenerationSettings(**greedy, stop_strings=(stop,)))
    assert answers[0] == whole[: at + 1]
    for answer, undisturbed in zip(answers, plain, strict=True):
        assert answer == undisturbed or stop in tokenizer.decode(answer)


def test_limits_count_as_in_peft(tokenizer):
    """max_length counts the text but not the virtual tokens; max_new_tokens takes precedence over it."""
    base, prompt = freeze(make_bloom(seed=2), FP32), torch.randn(5, 32)
    never = {"do_sample": False, "eos_token_id": (299,), "suppress_tokens": (299,)}
    for kind in ("packed", "padded"):
        asked = [([9, 8, 7], prompt), ([9], prompt)]
        lengths = [len(a) for a in answers_of(kind, base, tokenizer, asked, GenerationSettings(max_length=10, **never))]
        assert lengths == [7, 9]
        both = GenerationSettings(max_length=4, max_new_tokens=6, **never)
        assert [len(a) for a in answers_of(kind, base, tokenizer, asked, both)] == [6, 6]


def test_beam_search_equals_that_of_transformers(tokenizer):
    base, text, prompt = freeze(make_bloom(seed=2), FP32), [9, 8, 7], torch.randn(3, 32)
    words = torch.cat([prompt, base.get_input_embeddings()(torch.tensor(text))])[None]
    given = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 6, "do_sample": False}
    theirs = base.generate(inputs_embeds=words, pad_token_id=3, eos_token_id=2, **given).tolist()
    found = beam_search(base, tokenizer, Request(text, GenerationSettings(**given), prompt), FP32)
    assert found == [ids[: ids.index(2)] if 2 in ids else ids for ids in theirs]
    sampled = [
        beam_search(base, tokenizer, Request(text, GenerationSettings(num_beams=2, max_new_tokens=6), prompt, 5), FP32)
        for _ in range(2)
    ]
    assert sampled[0] == sampled[1]
