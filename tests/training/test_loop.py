"""The training loop: equal to Trainer + PEFT at each step; frozen base, schedule, micro-batches, fp16, faults."""

import copy
import functools
import math
from pathlib import Path

import pytest
import torch
from helpers.bases import make_bloom
from helpers.peers import random_examples
from helpers.trainer_runs import Recorder, peer_run
from transformers import BloomForCausalLM

from softprompt.config.train_args import TrainingArguments
from softprompt.data.dataloader import ListLoader, total_steps
from softprompt.data.tokenization import Example
from softprompt.engines.bloom_schedule import MicrobatchMajor
from softprompt.engines.factory import padded_engine
from softprompt.engines.microbatch_engine import MicrobatchEngine
from softprompt.evaluation.evaluator import Evaluator
from softprompt.generation.generator import make_generator
from softprompt.models.bloom_weights import ResidentWeights
from softprompt.models.loading import freeze
from softprompt.prompt.soft_prompt import PromptEmbedding, random_init
from softprompt.training.loop import train
from softprompt.utils.errors import TrainingError

ENGINES = pytest.mark.parametrize("kind", ["padded", "packed"])


def engine_of(kind, base, tokenizer, tokens=60, dtype=torch.float32):
    base = freeze(base, dtype)
    if kind == "packed":
        return MicrobatchEngine(MicrobatchMajor(ResidentWeights(base, dtype)), tokens_per_microbatch=tokens)
    return padded_engine(base, tokenizer, dtype, tokens)


def run(base, tokenizer, values, rows, learning_rate=1e-2, dtype=torch.float32, kind="padded", **settings):
    """Train a copy of `values` [P, H]. Return the prompt and the recorder of the callbacks."""
    args = TrainingArguments(**settings)
    engine = engine_of(kind, base, tokenizer, dtype=dtype)
    prompt, kept = PromptEmbedding(values), Recorder()
    train(engine, prompt, ListLoader(rows, args), args, learning_rate, kept)
    return prompt.weight.detach(), kept


COSINE = "cosine"
SAME = [
    {"num_train_epochs": 5, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},  # 10 steps an epoch
    {
        "max_steps": 50,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 8,
        "lr_scheduler_type": "cosine",
    },
    {
        "max_steps": 50,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "warmup_steps": 7,
        "weight_decay": 0.1,
        "max_grad_norm": 0.05,
        "seed": 3,
    },
]


@ENGINES
@pytest.mark.parametrize("settings", SAME)
def test_fifty_steps_equal_trainer_and_peft(settings, kind, tokenizer, tmp_path):
    base, values = make_bloom(), random_init(10)(torch.empty(1, 32))
    rows = random_examples(77, 19)  # the last window of each epoch is short
    theirs, history = peer_run(base, tokenizer, values, rows, tmp_path, learning_rate=1e-2, **settings)
    mine, kept = run(base, tokenizer, values, rows, kind=kind, **settings)
    assert len(kept.steps) == len(history) == 50
    for step, record in zip(kept.steps, history, strict=True):
        assert step.loss == pytest.approx(record["loss"], rel=1e-5)
        assert step.grad_norm == pytest.approx(record["grad_norm"], rel=1e-4)
        assert step.learning_rate == pytest.approx(record["learning_rate"], rel=1e-9)
        assert step.epoch == pytest.approx(record["epoch"], rel=1e-3)
    assert ((mine - theirs).norm() / theirs.norm()).item() < 1e-5
    assert (mine - values).norm() > 0.1  # and they moved


@ENGINES
def test_mini_base_equals_trainer_and_peft(kind, tmp_path):
    from transformers import AutoTokenizer

    from softprompt import mini
    from softprompt.data.template import Template
    from softprompt.data.tokenization import tokenize

    base = BloomForCausalLM.from_pretrained(mini.BASE_DIR, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(mini.BASE_DIR)
    rows = tokenize(mini.rows("sentiment", "train")[:300], tokenizer, Template(), 256).examples
    values = random_init(10)(torch.empty(1, base.config.hidden_size))
    settings = {"max_steps": 50, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    theirs, history = peer_run(base, tokenizer, values, rows, tmp_path, learning_rate=3e-2, **settings)
    mine, kept = run(base, tokenizer, values, rows, 3e-2, kind=kind, **settings)
    # These losses fall to 1e-3, and log-softmax in fp32 rounds each at 1e-7 where its target is almost certain.
    for step, record in zip(kept.steps, history, strict=True):
        assert step.loss == pytest.approx(record["loss"], rel=1e-5, abs=1e-6)
    assert ((mine - theirs).norm() / theirs.norm()).item() < 1e-5


@ENGINES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_prompt_changes(dtype, kind, tokenizer):
    base, values = freeze(make_bloom(), dtype), random_init(4)(torch.empty(1, 32))
    rows = random_examples(20, 9)
    before = copy.deepcopy(base.state_dict())
    engine = engine_of(kind, base, tokenizer, dtype=dtype)
    prompt = PromptEmbedding(values)
    Evaluator(engine, make_generator(engine, base, tokenizer), tokenizer, rows[:5], 2)(prompt.weight.detach())
    assert torch.equal(prompt.weight, values)
    args = TrainingArguments(max_steps=6)
    train(engine, prompt, ListLoader(rows, args), args, 1e-2, Recorder())
    assert not torch.equal(prompt.weight, values)
    assert prompt.weight.dtype == torch.float32
    assert not base.training and all(p.grad is None for p in base.parameters())
    after = base.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_microbatch_size_does_not_change_the_result(tokenizer):
    values, rows = random_init(4)(torch.empty(1, 32)), random_examples(40, 15)
    cuts = [(1, 16), (5, 3), (16, 1), (15, 1)]
    prompts = [
        run(make_bloom(), tokenizer, values, rows, per_device_train_batch_size=b, gradient_accumulation_steps=a)[0]
        for b, a in cuts
    ]
    assert torch.allclose(prompts[0], prompts[2], atol=1e-6)
    assert torch.allclose(prompts[1], prompts[3], atol=1e-6)
    assert not torch.allclose(prompts[0], prompts[1], atol=1e-6)


@pytest.mark.parametrize("epochs, expected", [(1, 3), (2, 6), (0.5, 2), (0.1, 1), (2.5, 8)])
def test_total_steps(epochs, expected):
    assert total_steps(70, TrainingArguments(num_train_epochs=epochs)) == expected  # windows of 32, 32 and 6 rows
    assert total_steps(70, TrainingArguments(num_train_epochs=epochs, max_steps=7)) == 7


def test_callbacks_are_called_at_their_steps(tokenizer):
    settings = {
        "max_steps": 11,
        "logging_steps": 4,
        "save_steps": 5,
        "eval_steps": 3,
        "eval_strategy": "steps",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    _, kept = run(make_bloom(), tokenizer, torch.ones(2, 32), random_examples(10, 5), **settings)
    assert [log["step"] for log in kept.logs] == [4, 8, 11]
    assert kept.saves == [5, 10, 11]
    assert kept.evaluations == [3, 6, 9]  # the last evaluation is the caller's
    assert kept.logs[0]["loss"] == pytest.approx(sum(s.loss for s in kept.steps[:4]) / 4)
    assert set(kept.logs[0]) == {"step", "epoch", "loss", "grad_norm", "learning_rate", "tokens_per_second"}
    _, kept = run(
        make_bloom(), tokenizer, torch.ones(2, 32), random_examples(10, 5), **settings | {"eval_strategy": "epoch"}
    )
    assert kept.evaluations == [3, 6, 9]  # 10 rows are windows of 4, 4 and 2


@ENGINES
def test_fp16_skips_overflowed_steps_without_moving_the_schedule(kind, tokenizer, monkeypatch):
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**24))
    values, rows = random_init(3)(torch.empty(1, 32)), random_examples(16, 9)
    settings = {"max_steps": 12, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    reference, _ = run(make_bloom(), tokenizer, values, rows, **settings)
    prompt, kept = run(make_bloom(), tokenizer, values, rows, dtype=torch.float16, kind=kind, **settings)
    overflowed = [s.number for s in kept.steps if s.grad_norm is None]
    rates = [s.learning_rate for s in kept.steps]
    assert 0 < len(overflowed) < 12 and overflowed == list(range(1, len(overflowed) + 1))
    assert rates[: len(overflowed) + 1] == [1e-2] * (len(overflowed) + 1) and len(set(rates)) == 12 - len(overflowed)
    assert prompt.isfinite().all()
    assert (prompt - values).norm() > 0.5 * (reference - values).norm()


@ENGINES
def test_non_finite_loss_stops_the_run(kind, tokenizer):
    base = make_bloom()
    with torch.no_grad():
        base.transformer.ln_f.bias[0] = math.nan
    with pytest.raises(TrainingError, match=r"step 1: the loss \(nan\).* is not finite .*--learning_rate"):
        run(base, tokenizer, torch.ones(2, 32), random_examples(4, 5), kind=kind)


def test_exact_match_counts_answers(tokenizer):
    engine = padded_engine(freeze(make_bloom(), torch.float32), tokenizer, torch.float32, 128)
    expected = [tokenizer(text)["input_ids"] for text in ("正面", "负面", "ok")]
    rows = [Example([70, *ids, 2], [-100, *ids, 2]) for ids in expected]
    given = [
        expected[0],
        expected[0],
        [*tokenizer(" ")["input_ids"], *expected[2]],
    ]  # right, wrong, a space too many

    class Given:
        def generate(self, requests, batch_size):
            return iter(enumerate(given))

    evaluation = Evaluator(engine, Given(), tokenizer, rows, 2)(None)
    assert evaluation.answers == ["正面", "正面", "ok"] and evaluation.exact_match == pytest.approx(2 / 3)
    assert evaluation.metrics("_base").keys() == {"eval_loss_base", "eval_perplexity_base", "eval_exact_match_base"}
    long = Example([70] + [99] * 40, [-100] + [99] * 40)
    evaluation = Evaluator(engine, Given(), tokenizer, [*rows, long], 2)(None)
    assert evaluation.answers is None and evaluation.metrics().keys() == {"eval_loss", "eval_perplexity"}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_padded_engine_with_other_architectures(family, tokenizer):
    from helpers.peers import naive_loss
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if family == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        base = LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).eval()
    else:
        base = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4)).eval()
    values, rows = random_init(5)(torch.empty(1, 32)).requires_grad_(), random_examples(6, 11)
    expected = naive_loss(base, values, rows)
    expected.backward()
    prompt = PromptEmbedding(values)
    engine = padded_engine(freeze(base, torch.float32), tokenizer, torch.float32, 128)
    total, count = engine.accumulate(prompt, rows, 1 / sum(sum(x != -100 for x in r.labels) for r in rows))
    assert total.item() / count == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(prompt.weight.grad, values.grad, rtol=1e-4, atol=1e-7)


def test_checkpoints_hold_no_base_weight(tmp_path: Path, tokenizer):
    from safetensors import safe_open

    from softprompt.prompt.adapter_folder import adapter_files, peft_config
    from softprompt.prompt.adapter_io import Adapter
    from softprompt.runs.checkpoints import state_files
    from softprompt.utils.atomic_io import write_folder

    class Saver(Recorder):
        def on_save(self, step, state):
            adapter = Adapter(prompt.weight, peft_config("b", base.config, prompt.weight, "RANDOM"))
            write_folder(tmp_path / "c", {**adapter_files(adapter), **state_files(state, {})})

    base, prompt = freeze(make_bloom(), torch.float32), PromptEmbedding(torch.ones(3, 32))
    engine = engine_of("packed", base, tokenizer)
    args = TrainingArguments(max_steps=1)
    train(engine, prompt, ListLoader(random_examples(4, 5), args), args, 1e-2, Saver())
    for path in (tmp_path / "c").glob("[ao]*.safetensors"):
        with safe_open(path, "pt") as file:
            assert {tuple(file.get_tensor(name).shape) for name in file.keys()} <= {(3, 32), ()}  # noqa: SIM118
