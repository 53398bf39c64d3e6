"""Continuous batching: each answer is the one that its request gets alone, and a step is one forward pass for all."""

import copy
import functools

import pytest
import torch
from helpers.bases import make_bloom
from helpers.peers import answers_of, generator_of, greedy_alone, peft_model
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

from softprompt.distributed.process_group import World
from softprompt.engines.bloom import run_prompt
from softprompt.generation import bloom_step, continuous_batching, kv_cache
from softprompt.generation import decode_linear as products
from softprompt.generation.bloom_step import BloomStepModel
from softprompt.generation.continuous_batching import ContinuousBatch, ContinuousBatchingGenerator
from softprompt.generation.decode_linear import decode_linear
from softprompt.generation.decoding_check import check_decoding
from softprompt.generation.generator import DataParallelGenerator
from softprompt.generation.kv_cache import KVCache, PrefixCache
from softprompt.generation.requests import GenerationSettings, Request, sample_seed
from softprompt.generation.sampling import next_tokens
from softprompt.models.bloom_weights import ResidentWeights
from softprompt.models.loading import freeze
from softprompt.utils.errors import ConfigError, ModelError, TrainingError

FP32 = torch.float32
GREEDY = GenerationSettings(max_new_tokens=9, do_sample=False)


def random_questions(n, longest, vocab_size=300, seed=0, virtual=(None, 1, 5, 40)):
    """`n` random texts of 1 to `longest` tokens, the first of a single token, with random prompts of `virtual` tokens
    in turn (None: no prompt)."""
    draw = torch.Generator().manual_seed(seed)
    prompts = [P if P is None else torch.randn(P, 32, generator=draw) for P in virtual]
    lengths = torch.randint(1, longest + 1, (n,), generator=draw).tolist()
    lengths[:1] = [1]
    texts = [torch.randint(4, vocab_size, (length,), generator=draw).tolist() for length in lengths]
    return [(text, prompts[i % len(prompts)]) for i, text in enumerate(texts)]


@pytest.mark.parametrize("batch_size", [1, 4, 20])
@pytest.mark.parametrize("kind, tokens_per_step", [("packed", 1), ("packed", 20), ("packed", 1000), ("padded", 0)])
def test_a_mixed_batch_gives_each_request_its_own_answer(kind, batch_size, tokens_per_step, tokenizer, monkeypatch):
    """Prompts of several lengths and none, texts of several lengths, one of them a single token."""
    monkeypatch.setitem(continuous_batching.MAX_TOKENS, "cpu", tokens_per_step)
    base = freeze(make_bloom(seed=2, n_layer=3), FP32)
    asked = random_questions(13, 14)
    ends = tuple(range(100, 130))  # many, so that some answers of a random base end early
    settings = GenerationSettings(max_new_tokens=9, do_sample=False, eos_token_id=ends)
    answers = answers_of(kind, base, tokenizer, asked, settings, batch_size)
    assert answers == [greedy_alone(base, text, prompt, 9, ends) for text, prompt in asked]
    assert len({len(answer) for answer in answers}) > 2


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("n_head, tied", [(3, True), (4, False)])
def test_other_shapes_of_bloom(n_head, tied, after, tokenizer):
    base = make_bloom(
        hidden_size=n_head * 10,
        n_head=n_head,
        vocab_size=61,
        tie_word_embeddings=tied,
        apply_residual_connection_post_layernorm=after,
        initializer_range=0.2,
    )
    asked = [(text, torch.randn(3, n_head * 10)) for text, _ in random_questions(6, 9, 61)]
    answers = answers_of("packed", freeze(base, FP32), tokenizer, asked, GREEDY, 4)
    assert answers == [greedy_alone(base, text, prompt, 9) for text, prompt in asked]


class CountedWeights(ResidentWeights):
    """Weights that note the number of each layer that is read."""

    def __init__(self, base, dtype):
        super().__init__(base, dtype)
        self.calls = []

    def iter_layers(self, order):
        for i, layer in zip(order, super().iter_layers(order), strict=True):
            self.calls.append(i)
            yield layer


def test_one_forward_per_step_serves_all_prompts(tokenizer):
    """Seven answers of 9 tokens in three slots take ⌈7 / 3⌉ · 9 forward passes, whatever prompts they have. Each prompt
    is run once, however many requests it has."""
    weights = CountedWeights(freeze(make_bloom(), FP32), FP32)
    generator = ContinuousBatchingGenerator(BloomStepModel(weights), tokenizer)
    endless = GenerationSettings(max_new_tokens=9, do_sample=False, eos_token_id=(299,), suppress_tokens=(299,))
    requests = [Request(text, endless, prompt) for text, prompt in random_questions(7, 9)]
    answers = dict(generator.generate(requests, 3))
    assert all(len(answer) == 9 for answer in answers.values())
    prompts = 4
    assert weights.calls == list(range(2)) * (prompts + 3 * 9)
    weights.calls.clear()
    for _ in generator.generate(requests, 3):
        pass
    assert len(weights.calls) == 2 * 3 * 9


def test_a_free_slot_is_refilled_in_the_next_step(tokenizer):
    """Answers of 2, 7, 3 and 4 tokens in two slots: 2 + 3 + 4 steps in one slot, 7 in the other, so 9 in all."""
    weights = CountedWeights(freeze(make_bloom(), FP32), FP32)
    never = {"do_sample": False, "eos_token_id": (299,), "suppress_tokens": (299,)}
    requests = [Request([5, 6], GenerationSettings(max_new_tokens=n, **never)) for n in (2, 7, 3, 4)]
    order = [
        number for number, _ in ContinuousBatchingGenerator(BloomStepModel(weights), tokenizer).generate(requests, 2)
    ]
    assert order == [0, 2, 1, 3] and len(weights.calls) == 2 * (1 + 9)


def test_a_changed_prompt_is_never_served_from_the_cache(tokenizer):
    base = freeze(make_bloom(seed=2), FP32)
    generator = generator_of("packed", base, tokenizer)
    prompt, text = torch.randn(4, 32, generator=torch.Generator().manual_seed(1)), [9, 8, 7]
    changes = [lambda: None, lambda: prompt.mul_(-1), lambda: prompt.data.add_(1.0), lambda: prompt.numpy().fill(0.5)]
    for change in changes:
        change()
        assert dict(generator.generate([Request(text, GREEDY, prompt)]))[0] == greedy_alone(base, text, prompt, 9)
        with torch.inference_mode():
            cached, expected = generator.prefix_cache(prompt), run_prompt(generator.model.weights, prompt)
        assert torch.allclose(cached.last_hidden, expected.last_hidden) and torch.allclose(
            cached.layers[1], expected.layers[1]
        )


def test_the_prefix_cache_evicts_the_least_recently_used_prompt(tokenizer, monkeypatch):
    """2 layers · keys and values · 2 tokens · 32 numbers of 4 bytes = 1,024 bytes per prompt."""
    monkeypatch.setattr(kv_cache, "MAX_PREFIX_BYTES", 2 * 1024)
    weights = CountedWeights(freeze(make_bloom(), FP32), FP32)
    prefixes = PrefixCache(BloomStepModel(weights).run_prompt)
    a, b, c = (torch.full((2, 32), value) for value in (1.0, 2.0, 3.0))
    for prompt in (a, b, a, c, a, b):  # c evicts b, since a was used after it
        prefixes(prompt)
        assert prefixes.num_bytes <= 2 * 1024
    assert len(weights.calls) == 2 * 4
    large = torch.ones(5, 32)  # 2,560 bytes: run, but not cached
    assert len(prefixes(large).layers[0]) == 5 and prefixes.num_bytes <= 2 * 1024


def test_an_entry_of_the_prefix_cache_is_freed_with_its_prompt(tokenizer):
    """Every evaluation during training uses another prompt, once. A prompt that stays alive is run once."""
    weights = CountedWeights(freeze(make_bloom(), FP32), FP32)
    generator = ContinuousBatchingGenerator(BloomStepModel(weights), tokenizer)
    constant, parameter = torch.ones(2, 32), torch.nn.Parameter(torch.randn(2, 32))
    for _ in range(5):
        for prompt in (constant, parameter.detach()):
            dict(generator.generate([Request([5, 6], GREEDY, prompt)]))
        del prompt
        parameter.data.add_(1.0)
        assert generator.prefix_cache.num_bytes == 1024
    weights.calls.clear()
    generator.prefix_cache(constant)
    assert not weights.calls


def test_a_prompt_is_hashed_once_for_all_its_requests(tokenizer, monkeypatch):
    hashed, blake2b = [], kv_cache.hashlib.blake2b
    monkeypatch.setattr(kv_cache.hashlib, "blake2b", lambda content: hashed.append(content) or blake2b(content))
    generator, prompt = generator_of("packed", freeze(make_bloom(), FP32), tokenizer), torch.randn(2, 32)
    dict(generator.generate([Request([5 + i], GREEDY, prompt) for i in range(20)], 4))
    assert len(hashed) == 1


@pytest.mark.parametrize("kind", ["packed", "padded"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_samples_do_not_depend_on_the_batch(kind, batch_size, tokenizer):
    base = freeze(make_bloom(seed=2), FP32)
    settings = GenerationSettings(max_new_tokens=9, top_k=20, temperature=0.9)
    requests = [Request(t, settings, p, sample_seed(7, i)) for i, (t, p) in enumerate(random_questions(8, 9))]
    generator = generator_of("packed", base, tokenizer)
    alone = [dict(generator.generate([request]))[0] for request in requests]
    together = dict(generator_of(kind, base, tokenizer).generate(requests[::-1], batch_size))
    assert [together[7 - i] for i in range(8)] == alone


class SmallMemoryGenerator(ContinuousBatchingGenerator):
    """Runs out of memory in steps of more than `room` slots, and in step number `once`: before anything is computed,
    or, if `late`, after keys and values have been written and random numbers drawn."""

    def __init__(self, base, tokenizer, room, once=None, late=False):
        super().__init__(BloomStepModel(ResidentWeights(base, FP32)), tokenizer)
        self.room, self.once, self.late, self.steps = room, once, late, 0

    def new_batch(self, batch_size):
        return SmallMemoryBatch(self, batch_size)


class SmallMemoryBatch(ContinuousBatch):
    def _forward(self):
        limits = self.generator
        limits.steps += 1
        if len(self.slots) > limits.room or limits.steps == limits.once:
            if limits.late:
                next_tokens(super()._forward(), [slot.state for slot in self.slots])
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super()._forward()


SAMPLED = GenerationSettings(max_new_tokens=9, top_k=20, temperature=0.9)


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("room, once, halvings", [(3, None, [4, 2]), (1, None, [4, 2, 1]), (1000, 5, [4])])
def test_out_of_memory_halves_the_slots(room, once, halvings, late, settings, tokenizer, capsys):
    """The answers stay the same, also those that were begun, and `on_token` is called once per token."""
    base = freeze(make_bloom(seed=2), FP32)
    requests = [
        Request(text, settings, prompt, sample_seed(7, i)) for i, (text, prompt) in enumerate(random_questions(9, 9))
    ]
    expected = dict(
        ContinuousBatchingGenerator(BloomStepModel(ResidentWeights(base, FP32)), tokenizer).generate(requests, 8)
    )
    tokens: dict[int, list[int]] = {index: [] for index in expected}
    small = SmallMemoryGenerator(base, tokenizer, room, once, late)
    assert dict(small.generate(requests, 8, lambda index, token: tokens[index].append(token))) == expected == tokens
    assert [line for line in capsys.readouterr().err.splitlines() if line] == [
        f"out of memory: {n} answers at a time instead of {2 * n}; the answers stay the same" for n in halvings
    ]


def test_a_decoding_step_uses_the_kernels_for_few_rows(tokenizer, monkeypatch):
    """In every linear layer of the blocks and in the head."""
    base, rows = freeze(make_bloom(n_layer=3), FP32), []
    monkeypatch.setattr(bloom_step, "decode_linear", lambda x, *rest: rows.append(len(x)) or decode_linear(x, *rest))
    generator = generator_of("packed", base, tokenizer)
    assert len(dict(generator.generate([Request([5, 6, 7], GenerationSettings(max_new_tokens=1))]))) == 1
    assert len(rows) >= 4 * 3 + 1


def test_a_kv_cache_that_cannot_be_allocated_is_halved(tokenizer, monkeypatch, capsys):
    base = freeze(make_bloom(seed=2), FP32)
    requests = [Request(text, GREEDY, prompt) for text, prompt in random_questions(9, 9)]
    generator = ContinuousBatchingGenerator(BloomStepModel(ResidentWeights(base, FP32)), tokenizer)
    expected = dict(generator.generate(requests, 8))

    def small(slots, *sizes):
        if slots > 2:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return KVCache(slots, *sizes)

    monkeypatch.setattr(bloom_step, "KVCache", small)
    assert dict(generator.generate(requests, 8)) == expected
    assert capsys.readouterr().err.count("out of memory") == 2


def test_a_prompt_that_arrives_when_memory_is_full(tokenizer, monkeypatch, capsys):
    """Its keys and values need memory, too; the answers that are being written go on."""
    base = freeze(make_bloom(seed=2), FP32)
    requests = [Request(text, GREEDY, torch.randn(3, 32)) for text, _ in random_questions(6, 9)]
    model = BloomStepModel(ResidentWeights(base, FP32))
    expected = [dict(ContinuousBatchingGenerator(model, tokenizer).generate(requests, 4))[i] for i in range(6)]
    run_prompt, calls = model.run_prompt, []

    def limited(prompt):
        calls.append(prompt)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run_prompt(prompt)

    monkeypatch.setattr(model, "run_prompt", limited)
    batch = ContinuousBatchingGenerator(model, tokenizer).new_batch(4)
    states = batch.add(requests[:3])
    batch.step(lambda state, token: None)
    states += batch.add(requests[3:])
    while batch:
        batch.step(lambda state, token: None)
    answers = [state.token_ids[state.text_tokens :] for state in states]
    assert answers == expected and "out of memory" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_out_of_memory_halves_the_batch_of_transformers(settings, tokenizer, monkeypatch, capsys):
    base = freeze(make_bloom(seed=2), FP32)
    requests = [
        Request(text, settings, prompt, sample_seed(7, i)) for i, (text, prompt) in enumerate(random_questions(9, 9))
    ]
    expected = dict(generator_of("padded", base, tokenizer).generate(requests, 8))
    generator = generator_of("padded", base, tokenizer)
    forward, calls = base.forward, []

    @functools.wraps(forward)  # transformers inspects the signature
    def limited(*args, **kwargs):
        calls.append(next(len(value) for value in kwargs.values() if isinstance(value, torch.Tensor)))
        if calls[-1] > 3 and len(calls) > 4:  # after the first tokens
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(base, "forward", limited)
    assert dict(generator.generate(requests, 8)) == expected
    assert calls[0] == 8 and calls[-1] <= 3 and capsys.readouterr().err.count("out of memory") == 2


def test_no_memory_for_one_answer_is_an_error_and_other_errors_pass_through(tokenizer):
    base = freeze(make_bloom(), FP32)
    with pytest.raises(TrainingError, match="out of memory with one answer at a time"):
        list(SmallMemoryGenerator(base, tokenizer, 0).generate([Request([5], GREEDY)] * 3, 2))

    def broken(index, token):
        raise RuntimeError("another one")

    with pytest.raises(RuntimeError, match="another one"):
        list(generator_of("packed", base, tokenizer).generate([Request([5], GREEDY)] * 3, 2, broken))


def test_every_generator_checks_its_requests_at_the_call(tokenizer):
    base, too_long = freeze(make_bloom(), FP32), Request([5] * 30, GenerationSettings(max_length=20))
    for kind in ("packed", "padded"):
        generator = generator_of(kind, base, tokenizer)
        for each in (generator, DataParallelGenerator(generator, World())):
            with pytest.raises(ConfigError, match="--max_length 20"):
                each.generate([too_long])


def test_on_token_gets_every_token(tokenizer):
    base = freeze(make_bloom(seed=2), FP32)
    for kind in ("packed", "padded"):
        tokens = {index: [] for index in range(5)}
        requests = [Request(text, GREEDY, prompt) for text, prompt in random_questions(5, 9)]
        generator = generator_of(kind, base, tokenizer)
        answers = dict(generator.generate(requests, 2, lambda index, token, t=tokens: t[index].append(token)))
        assert tokens == answers


def test_bf16_follows_fp32(tokenizer):
    """The first tokens are mostly the same; later ones diverge, since a random base has no clear favorite."""
    base = make_bloom(seed=2)
    asked = random_questions(6, 9)
    exact = answers_of("packed", freeze(copy.deepcopy(base), FP32), tokenizer, asked, GREEDY)
    generator = ContinuousBatchingGenerator(
        BloomStepModel(ResidentWeights(freeze(base, torch.bfloat16), torch.bfloat16)), tokenizer
    )
    requests = [Request(text, GREEDY, prompt) for text, prompt in asked]
    rounded = dict(generator.generate(requests))
    assert sum(rounded[i][:1] == exact[i][:1] for i in range(6)) >= 5


@pytest.mark.parametrize("S", [0, 1, 2, 33, 64, 65])
@pytest.mark.parametrize("words", [1, 2, 7, 64])
@torch.no_grad()
def test_decode_linear_of_few_rows(S, words):
    x, weight, bias = torch.randn(16, S).T, torch.randn(words, 16), torch.randn(words)
    for shift in (None, bias):
        expected = x.double() @ weight.double().T + (0 if shift is None else shift.double())
        assert torch.allclose(decode_linear(x, weight, shift).double(), expected, atol=1e-5)


@pytest.mark.parametrize("few, transposed", [(0, 0), (10**6, 0), (10**6, 10**6)])
@torch.no_grad()
def test_the_thresholds_of_decode_linear_do_not_change_its_results(few, transposed, monkeypatch):
    """They were chosen for speed on one machine."""
    monkeypatch.setattr(products, "MAX_FEW_ROWS", few)
    monkeypatch.setattr(products, "MIN_TRANSPOSED", transposed)
    for S in (1, 15, 64, 200):
        test_decode_linear_of_few_rows(S, 7)


@pytest.fixture(scope="module")
def base_46k(shared):
    """A random BLOOM with a vocabulary of 46,145 tokens, and the tokenizer."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(shared / "tokenizer-46k")
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=46145, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.2)
    return BloomForCausalLM(config).eval().requires_grad_(False), tokenizer


def test_answers_equal_those_of_peft_with_a_vocabulary_of_46145(base_46k):
    """PEFT answers each adapter's questions in one left-padded batch; ours answer alone, and both adapters in one mixed
    batch."""
    base, tokenizer = base_46k
    questions = ["如何写好一个简历?", "Human: 写一首诗\n\nAssistant: ", "好", "给出三个保持健康的建议。"]
    prompts = [torch.randn(P, 64, generator=torch.Generator().manual_seed(P)) for P in (10, 3)]
    peers = [peft_model(base, prompt) for prompt in prompts]
    given = {"max_new_tokens": 8, "do_sample": False, "use_cache": False, "pad_token_id": tokenizer.pad_token_id}
    texts = tokenizer(questions)["input_ids"]
    expected = {}
    for number, peer in enumerate(peers):
        batch = tokenizer(questions, return_tensors="pt", padding=True, padding_side="left")
        out = peer.generate(**batch, eos_token_id=tokenizer.eos_token_id, **given)
        for text, answer in zip(questions, out[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            end = answer.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in answer else None
            expected[text, number] = answer[:end]
    settings = GenerationSettings(max_new_tokens=8, do_sample=False)
    asked = [(ids, prompts[n], expected[text, n]) for n in (0, 1) for text, ids in zip(questions, texts, strict=True)]
    mixed = asked[::2] + asked[1::2]
    answers = answers_of("packed", base, tokenizer, [(ids, prompt) for ids, prompt, _ in mixed], settings, 5)
    assert answers == [answer for _, _, answer in mixed]
    for ids, prompt, answer in asked:
        assert answers_of("packed", base, tokenizer, [(ids, prompt)], settings) == [answer]


def test_the_check_for_cuda_sees_wrong_slopes_of_alibi():
    base = freeze(make_bloom(), torch.float32)
    model = BloomStepModel(ResidentWeights(base, torch.float32))
    check_decoding(model, base, torch.float32)
    model.slopes *= 1.5
    with pytest.raises(ModelError, match="logits of decoding steps differ"):
        check_decoding(model, base, torch.float32, longest=40)
