"""Reparameterized prompts: where they begin, their gradient, and their training compared with naive references."""

import peft
import pytest
import torch
from helpers.bases import make_bloom
from helpers.peers import naive_loss, random_examples
from helpers.small_bases import small_base
from helpers.trainer_runs import Recorder
from peft.tuners.p_tuning import PromptEncoder

from softprompt.config.loader import train_config
from softprompt.config.train_args import TrainingArguments
from softprompt.data.dataloader import ListLoader
from softprompt.data.tokenization import count_targets
from softprompt.engines.factory import padded_engine
from softprompt.models.loading import freeze
from softprompt.prompt.reparameterization import MLPEncoder, ReparameterizedPrompt
from softprompt.training import prompt_setup
from softprompt.training.loop import train
from softprompt.training.lr_schedules import learning_rates
from softprompt.training.prompt_setup import initial_prompt, trainable_prompt
from softprompt.utils.errors import ConfigError


def settings(**given):
    given = {"encoder_hidden_size": 16, "prompt_reparameterization": "mlp", **given}
    return train_config(model_name_or_path="x", dataset="x", **given)


def moved(P, H=32, width=16):
    """A prompt whose trained parameters are all away from their initial values, where many gradients are 0."""
    torch.manual_seed(P)
    prompt = ReparameterizedPrompt(MLPEncoder(torch.randn(P, H), width))
    with torch.no_grad():
        for parameter in prompt.trained_parameters().values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    prompt.fold()
    return prompt


@pytest.mark.parametrize(
    "start",
    [
        {"prompt_tuning_init": "RANDOM", "num_virtual_tokens": 1},
        {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "我爱这部电影"},
        {"prompt_tuning_init": "SAMPLE_VOCAB"},
        {"prompt_tuning_init": "CLASS_LABELS", "class_labels": "正面,很差"},
    ],
    ids=lambda start: start["prompt_tuning_init"],
)
def test_an_mlp_begins_at_the_initial_prompt(start, tokenizer):
    """The embedding module of Gemma scales. SAMPLE_VOCAB may draw a word twice, which an MLP can output twice."""
    config, base = settings(**start), small_base("gemma")
    found = trainable_prompt(config, tokenizer, base).weight
    torch.testing.assert_close(found, initial_prompt(config, tokenizer, base), rtol=1e-4, atol=1e-4)


def test_an_mlp_with_fewer_units_than_virtual_tokens_begins_near_the_start():
    start = torch.randn(40, 32)
    left = (MLPEncoder(start, 8)() - start).norm() / start.norm()
    assert 0.1 < left < 1
    assert (MLPEncoder(start, 120)() - start).norm() < 1e-5 * start.norm()


@pytest.mark.parametrize("seed", range(4))
def test_a_narrow_mlp_begins_at_the_least_squares_approximation_of_a_small_start(seed):
    torch.manual_seed(seed)
    start = 0.1 * torch.randn(10, 32)
    encoder = MLPEncoder(start, 1)
    hidden = torch.cat([encoder.mlp_head[:-1](encoder.embedding), torch.ones(10, 1)], 1)
    expected = hidden @ torch.linalg.pinv(hidden) @ start
    assert (encoder() - expected).norm() < 1e-4 * start.norm()


def test_an_encoder_that_does_not_fit_in_memory_is_refused(tokenizer, monkeypatch):
    def fail(*args):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes.")

    monkeypatch.setattr(prompt_setup, "MLPEncoder", fail)
    with pytest.raises(ConfigError, match="--encoder_hidden_size 16: the MLP does not fit in memory; give a smaller"):
        trainable_prompt(settings(), tokenizer, small_base("llama"))


def test_the_mlp_is_that_of_peft():
    prompt = moved(7)
    theirs = PromptEncoder(
        peft.PromptEncoderConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=7,
            token_dim=32,
            encoder_hidden_size=16,
            num_transformer_submodules=1,
        )
    )
    state = prompt.encoder.state_dict()
    theirs.load_state_dict({("embedding.weight" if name == "embedding" else name): t for name, t in state.items()})
    assert torch.equal(theirs(torch.arange(7)), prompt.weight)


@pytest.mark.parametrize("P", [1, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_equals_that_of_autograd_through_base_and_encoder(P, dtype, tokenizer):
    base, rows, prompt = freeze(make_bloom(), dtype), random_examples(5, 9), moved(P)
    trained = prompt.trained_parameters()
    naive_loss(make_bloom(), prompt.encoder(), rows).backward()
    expected = {name: parameter.grad for name, parameter in trained.items()}
    for parameter in trained.values():
        parameter.grad = None
    engine = padded_engine(base, tokenizer, dtype, 300)  # several micro-batches
    engine.accumulate(prompt, rows, 1 / sum(map(count_targets, rows)))
    assert all(parameter.grad is None for parameter in trained.values())
    prompt.backward()
    assert prompt.weight.grad is None
    near = 1e-4 if dtype is torch.float32 else 0.1
    for name, parameter in trained.items():
        assert (parameter.grad - expected[name]).norm() < near * expected[name].norm() + 1e-7, name


def test_training_equals_a_naive_loop_over_the_encoder(tokenizer):
    """Clipping and weight decay concern the trained parameters."""
    base, rows = freeze(make_bloom(), torch.float32), random_examples(12, 9)
    given = {"max_grad_norm": 0.5, "weight_decay": 0.1, "max_steps": 6, "per_device_train_batch_size": 12}
    args = TrainingArguments(**given, gradient_accumulation_steps=1)
    prompt, theirs, kept = moved(3), moved(3).encoder, Recorder()
    train(padded_engine(base, tokenizer, torch.float32, 300), prompt, ListLoader(rows, args), args, 1e-2, kept)
    optimizer, lr_at = torch.optim.AdamW(theirs.parameters(), weight_decay=0.1), learning_rates(args, 1e-2, 6)
    for step in kept.steps:
        loss = naive_loss(base, theirs(), rows)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = lr_at(step.number - 1)
        optimizer.step()
        optimizer.zero_grad()
        assert step.loss == pytest.approx(loss.item(), rel=1e-4)
        assert step.grad_norm == pytest.approx(norm.item(), rel=1e-3)
    assert torch.equal(prompt.weight, prompt.encoder())
    torch.testing.assert_close(prompt.weight, theirs(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"encoder_hidden_size": 8}, "--encoder_hidden_size is only used with --prompt_reparameterization"),
        ({"prompt_reparameterization": "mlp", "encoder_hidden_size": 0}, "--encoder_hidden_size 0 must lie in"),
        ({"prompt_reparameterization": "lstm"}, "--prompt_reparameterization 'lstm' is not one of none, mlp"),
        ({"encoder_reparameterization_type": "MLP"}, "did you mean prompt_reparameterization"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        train_config(**given)
