"""Continuous batching for any decoder: greedy answers are those of each text alone, by the definition."""

import pytest
import torch
from helpers.peers import greedy_alone, greedy_and_lead
from helpers.small_bases import WINDOW, small_base

from softprompt.engines.decoder_schedule import DecoderSchedule
from softprompt.engines.factory import engine_for_inference
from softprompt.generation import decoder_generator, decoder_step
from softprompt.generation.continuous_batching import ContinuousBatchingGenerator
from softprompt.generation.decoder_generator import DecoderGenerator
from softprompt.generation.decoder_step import DecoderStepModel
from softprompt.generation.decoding_check import check_decoding
from softprompt.generation.generator import in_request_order, make_generator
from softprompt.generation.requests import GenerationSettings, Request
from softprompt.models.loading import freeze
from softprompt.utils.errors import ConfigError

FP32, BF16 = torch.float32, torch.bfloat16
LEAD = 0.3  # of the largest logit; rounding to bf16 changes less
GREEDY = GenerationSettings(max_new_tokens=2 * WINDOW, do_sample=False)
EXACT = [
    *("llama", "qwen2", "qwen2_full", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "gpt2", "phi3", "gpt_neox"),
    *("olmo2", "opt", "cohere", "granite", "mixtral", "gpt_oss"),
]


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize(("batch_size", "prefill"), [(1, None), (3, None), (8, 20)])
def test_greedy_answers_are_those_of_each_text_alone(kind, batch_size, prefill, tokenizer):
    """Prompts of three lengths and none, and texts shorter and longer than a window, share a batch; slots refill."""
    base, draw = freeze(small_base(kind, seed=1), FP32), torch.Generator().manual_seed(3)
    prompts = [None, *(torch.randn(P, 32, generator=draw) for P in (1, 4, WINDOW + 3))]
    asked = [
        (torch.randint(5, 300, (n,), generator=draw).tolist(), prompts[i % 4])
        for i, n in enumerate((2, 3 * WINDOW, WINDOW, WINDOW + 5, 1, 7, 2 * WINDOW))
    ]
    model = DecoderStepModel(DecoderSchedule(base, FP32))
    generator = ContinuousBatchingGenerator(model, tokenizer, prefill)
    requests = [Request(text, GREEDY, prompt) for text, prompt in asked]
    answers = list(in_request_order(generator.generate(requests, batch_size)))
    assert answers == [greedy_alone(base, text, prompt, GREEDY.max_new_tokens) for text, prompt in asked]


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gemma3_text", "gpt_oss"])
def test_greedy_answers_in_bf16_are_those_of_fp32_where_rounding_cannot_choose_another_token(kind, tokenizer):
    """Texts shorter and longer than a window, with and without a prompt, share a batch."""
    base, draw, asked, expected = small_base(kind, seed=1), torch.Generator().manual_seed(3), [], []
    prompts = [None, *(torch.randn(P, 32, generator=draw) for P in (1, 4, WINDOW + 3))]
    for i in range(150):
        text = torch.randint(5, 300, ((2, WINDOW, 3 * WINDOW)[i % 3],), generator=draw).tolist()
        answer, lead = greedy_and_lead(base, text, prompts[i % 4], 4)
        if lead > LEAD and len(answer) == 4:
            asked.append((text, prompts[i % 4]))
            expected.append(answer)
    assert len(asked) >= 6 and {len(text) for text, _ in asked} == {2, WINDOW, 3 * WINDOW}
    model = DecoderStepModel(DecoderSchedule(freeze(base, BF16), BF16))
    settings = GenerationSettings(max_new_tokens=4, do_sample=False)
    generator = ContinuousBatchingGenerator(model, tokenizer)
    requests = [Request(text, settings, prompt) for text, prompt in asked]
    assert list(in_request_order(generator.generate(requests, 4))) == expected


def generator_for(kind, tokenizer, engine):
    """The generator that infer.py takes with this --engine."""
    base = freeze(small_base(kind), FP32)
    return make_generator(engine_for_inference(engine, base, tokenizer, FP32), base, tokenizer, engine)


@pytest.mark.parametrize("kind", EXACT)
def test_a_decoder_that_passes_the_check_answers_in_continuous_batches(kind, tokenizer):
    assert str(generator_for(kind, tokenizer, "auto")) == "packed engine"
    assert str(generator_for(kind, tokenizer, "padded")) == "transformers"


@pytest.mark.parametrize("kind", ["llama4_text", "stablelm", "mpt", "jamba"])
def test_what_fails_the_check_answers_with_transformers(kind, tokenizer):
    assert str(generator_for(kind, tokenizer, "auto")) == "transformers"
    with pytest.raises(ConfigError, match=r"--engine packed: .*give --engine auto"):
        generator_for(kind, tokenizer, "packed")


def test_the_check_sees_a_window_that_is_off_by_one(tokenizer, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    seen = decoder_step.visible
    monkeypatch.setattr(decoder_step, "visible", lambda *args: seen(*args[:2], args[2] and args[2] + 1))
    assert str(generator_for("mistral", tokenizer, "auto")) == "transformers"


def test_an_answer_ends_at_the_last_position(tokenizer):
    base = freeze(small_base("gpt2"), FP32)  # 256 positions
    generator = ContinuousBatchingGenerator(DecoderStepModel(DecoderSchedule(base, FP32)), tokenizer)
    settings = GenerationSettings(max_new_tokens=50, do_sample=False, eos_token_id=(299,))
    ((_, answer),) = generator.generate([Request([5] * 240, settings, torch.randn(10, 32))])
    assert len(answer) <= 6


def test_running_out_of_memory_halves_the_slots(tokenizer, monkeypatch, capsys):
    base = freeze(small_base("llama", seed=1), FP32)
    model = DecoderStepModel(DecoderSchedule(base, FP32))
    requests = [Request([5 + i] * (3 + i), GREEDY, torch.randn(2, 32)) for i in range(6)]
    expected = dict(ContinuousBatchingGenerator(model, tokenizer).generate(requests, 8))
    forward = model.forward

    def limited(cache, step):
        if len(step.positions) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(cache, step)

    monkeypatch.setattr(model, "forward", limited)
    assert dict(ContinuousBatchingGenerator(model, tokenizer).generate(requests, 8)) == expected
    assert capsys.readouterr().err.count("out of memory") == 2


def test_longer_rows_are_checked_before_they_are_answered(tokenizer, monkeypatch, tmp_path):
    """A window that the base applies in its masks alone shows only in rows that are longer."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    base = freeze(small_base("qwen2_moe", seed=2), FP32)
    generator = DecoderGenerator(base, tokenizer, FP32)
    answered, new_batch = [], generator.continuous.new_batch
    monkeypatch.setattr(generator.continuous, "new_batch", lambda *args: answered.append(args) or new_batch(*args))
    settings = GenerationSettings(max_new_tokens=6, do_sample=False)
    for length, continuous in ((5, 1), (50, 1), (9, 2)):
        ids, prompt = (
            [(11 * i) % 290 + 5 for i in range(length)],
            torch.randn(3, 32, generator=torch.Generator().manual_seed(1)),
        )
        ((_, answer),) = generator.generate([Request(ids, settings, prompt)])
        assert answer == greedy_alone(base, ids, prompt, 6) and len(answered) == continuous
    with pytest.raises(ConfigError, match="--engine packed"):
        DecoderGenerator(base, tokenizer, FP32, only=True).generate([Request([5] * 50, settings)])


def test_a_length_is_checked_once(tokenizer, monkeypatch):
    """Whether the check passes or fails, and where no file can be written."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    base, calls = freeze(small_base("qwen2_moe", seed=2), FP32), []
    generator = DecoderGenerator(base, tokenizer, FP32)
    check = decoder_generator.check_decoding
    monkeypatch.setattr(decoder_generator, "check_decoding", lambda *args: calls.append(args[-1]) or check(*args))
    settings = GenerationSettings(max_new_tokens=3, do_sample=False)
    chosen = [generator.choose([Request([5] * length, settings)]) for length in (50, 51, 24, 25, 50)]
    assert calls == [64, 32] and chosen[0] is chosen[1] is chosen[4] is generator.transformers


def test_the_check_computes_no_logits_that_it_does_not_compare(tokenizer, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    base, positions = freeze(small_base("llama"), FP32), []
    base.lm_head.register_forward_hook(lambda module, given, out: positions.append(out.shape[1]))
    check_decoding(DecoderStepModel(DecoderSchedule(base, FP32)), base, FP32, longest=60)
    assert max(positions) < 20


def test_rows_that_change_the_frequencies_of_others_are_not_answered_together(tokenizer):
    base = freeze(small_base("llama_dynamic", max_position_embeddings=40), FP32)
    generator = DecoderGenerator(base, tokenizer, FP32, only=True)
    settings = GenerationSettings(max_new_tokens=6, do_sample=False)
    assert len(list(generator.generate([Request([5] * 30, settings)]))) == 1
    with pytest.raises(ConfigError, match="rotary frequencies"):
        generator.generate([Request([5] * 40, settings)])
