"""Whole runs with a reparameterized prompt: what they write, resuming, the best prompt, the learning-rate finder."""

import copy
import functools
import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from helpers.bases import make_bloom
from helpers.peers import random_examples
from helpers.short_runs import interrupted, outcome
from safetensors.torch import load_file
from transformers import BloomForCausalLM

import softprompt
from softprompt.config.loader import train_config
from softprompt.config.train_args import TrainingArguments
from softprompt.distributed.process_group import World
from softprompt.engines.factory import padded_engine
from softprompt.models.loading import freeze
from softprompt.prompt.adapter_io import load_adapter
from softprompt.prompt.reparameterization import MLPEncoder, ReparameterizedPrompt
from softprompt.training.dry_run import dry_run
from softprompt.training.lr_finder import find_learning_rate
from softprompt.training.resume_settings import merge_settings
from softprompt.training.run import Observer, run_training
from softprompt.utils.errors import CheckpointError

ENCODER, WEIGHTS = "prompt_encoder.safetensors", "adapter_model.safetensors"
WIDTH = "encoder_hidden_size"
MLP = {"prompt_reparameterization": "mlp"}


@pytest.fixture
def settings(run_settings):
    return {**run_settings, "encoder_hidden_size": 16, "learning_rate": 0.01, "max_steps": 8}


@pytest.mark.parametrize(
    "given",
    [
        {"bf16": True, "prompt_tuning_init": "SAMPLE_VOCAB"},
        {"engine": "padded"},
        {"streaming": True},
        {"fp16": True},
    ],
    ids=lambda given: "-".join(map(str, given.values())),
)
def test_a_killed_run_resumes_identically(given, settings, monkeypatch):
    if "fp16" in given:  # and skips its first steps
        monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**24))
    softprompt.train(**settings, **MLP, **given)
    expected, encoder = outcome(), Path("run", ENCODER).read_bytes()
    shutil.rmtree("run")
    interrupted({**settings, **MLP, **given}, 5)
    softprompt.train(resume_from_checkpoint="run")
    assert outcome() == expected and Path("run", ENCODER).read_bytes() == encoder


def test_what_a_run_writes_and_prints(settings, tiny_base, capsys):
    begin = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "我爱这部电影"}
    run = softprompt.train(**settings, **begin, **MLP)
    told, P = capsys.readouterr().out, len(load_adapter("run").prompt)
    last = Path("run/checkpoint-8")
    state, moments = load_file(last / ENCODER), load_file(last / "optimizer.safetensors")
    trained = {name.removesuffix(".exp_avg") for name in moments if name.endswith(".exp_avg")}
    count = sum(state[name].numel() for name in trained)
    assert f"trainable params: {count:,} || all params: {count + run.setup.base.num_parameters():,}" in told
    assert f"reparameterized (mlp, --encoder_hidden_size 16), saved as {P} × 32 values" in told
    assert state.keys() == trained
    encoder = MLPEncoder(torch.zeros(P, 32), 16)
    encoder.load_state_dict(state)
    assert torch.equal(load_adapter(last).prompt, encoder().detach())  # folded
    theirs = peft.PeftModel.from_pretrained(BloomForCausalLM.from_pretrained(tiny_base), "run")
    assert torch.equal(theirs.prompt_encoder["default"].embedding.weight, load_adapter("run").prompt)
    card = Path("run/README.md").read_text(encoding="utf-8")
    assert "| prompt_reparameterization | mlp |" in card and "| encoder_hidden_size | 16 |" in card
    softprompt.train(**{**settings, **begin, "output_dir": "plain", "encoder_hidden_size": None})
    assert not list(Path("plain").rglob(ENCODER))
    assert load_file("plain/optimizer.safetensors").keys() == {"exp_avg", "exp_avg_sq", "step"}
    assert Path("plain", WEIGHTS).stat().st_size == Path("run", WEIGHTS).stat().st_size
    assert Path("plain/adapter_config.json").read_bytes() == Path("run/adapter_config.json").read_bytes()
    starts = [load_file(f"{folder}/prompt_start.safetensors")["prompt_embeddings"] for folder in ("plain", "run")]
    torch.testing.assert_close(*starts, rtol=1e-4, atol=1e-4)


def test_a_resume_with_another_reparameterization_is_refused(settings):
    interrupted({**settings, **MLP, WIDTH: None}, 5)
    refused = r"run/checkpoint-4: was trained with --prompt_reparameterization mlp --encoder_hidden_size 32"
    for name, value in (("prompt_reparameterization", "none"), (WIDTH, 8)):
        wrong = f"{refused}, and cannot continue with --{name} {value}; .* --init_adapter run/checkpoint-4"
        with pytest.raises(CheckpointError, match=wrong):
            softprompt.train(resume_from_checkpoint="run", **{name: value})
    other = {**settings, **MLP, "output_dir": "other", "max_steps": 1, WIDTH: 40}
    softprompt.train(**other, init_adapter="run/checkpoint-4")
    start = load_file("other/prompt_start.safetensors")["prompt_embeddings"]
    torch.testing.assert_close(start, load_adapter("run/checkpoint-4").prompt, rtol=1e-4, atol=1e-4)
    softprompt.train(resume_from_checkpoint="run", **MLP, encoder_hidden_size=32)


@pytest.mark.parametrize("kind", ["superpos", "residual_mlp"])
def test_a_kind_that_this_version_does_not_have_is_named(kind):
    config = train_config(resume_from_checkpoint="run")
    state = {"arguments": {"prompt_reparameterization": kind, "learning_rate": None, "prompt_tuning_init": "RANDOM"}}
    with pytest.raises(CheckpointError, match=rf"--prompt_reparameterization {kind}, .* --init_adapter run/check"):
        merge_settings(config, Path("run/checkpoint-2"), state)


def test_a_plain_run_does_not_resume_with_a_reparameterization(run_settings):
    interrupted(run_settings, 5)
    with pytest.raises(CheckpointError, match="trained with --prompt_reparameterization none, and cannot"):
        softprompt.train(resume_from_checkpoint="run", prompt_reparameterization="mlp")


def test_the_best_prompt_comes_with_its_encoder(settings):
    best = {"load_best_model_at_end": True, "eval_steps": 2, "greater_is_better": True}  # so that the first is the best
    softprompt.train(**settings | best, **MLP)
    step = json.loads(Path("run/all_results.json").read_text())["best_global_step"]
    assert step < 8
    for name in (WEIGHTS, ENCODER, "optimizer.safetensors"):
        assert Path("run", name).read_bytes() == Path(f"run/checkpoint-{step}", name).read_bytes()
        assert Path("run", name).read_bytes() != Path("run/checkpoint-8", name).read_bytes()


def test_rank_0s_parameters_are_every_ranks(settings):
    """The broadcast reaches the trained parameters, and the prompt is computed from them before it is used."""

    class FromRank0(World):
        def broadcast(self, value):
            return torch.ones_like(value)

    class Begun(Observer):
        def begin(self, run, callbacks):
            self.prompt = copy.deepcopy(run.setup.prompt)

    seen = Begun()
    run_training(train_config(**settings | {"max_steps": 1} | MLP), FromRank0(), seen)
    assert all((parameter == 1).all() for parameter in seen.prompt.trained_parameters().values())
    assert torch.equal(seen.prompt.weight, seen.prompt.encoder())


def test_the_learning_rate_finder_trains_copies_of_the_encoder(tokenizer):
    class Never:
        exit_code = None

    rows = random_examples(70, 9)
    engine = padded_engine(freeze(make_bloom(), torch.float32), tokenizer, torch.float32, 200)
    prompt = ReparameterizedPrompt(MLPEncoder(torch.randn(3, 32), 16))
    before = copy.deepcopy(prompt.state_dict())
    args = TrainingArguments(per_device_train_batch_size=4, gradient_accumulation_steps=1, max_steps=10)
    found = find_learning_rate(engine, prompt, rows, args, 10, 4, Never, rates=(1e-3, 1e-2))
    assert all(torch.equal(value, before[name]) for name, value in prompt.state_dict().items())
    assert len(set(found.losses.values())) == 2 and found.start not in found.losses.values()
    again = find_learning_rate(engine, prompt, rows, args, 10, 4, Never, rates=(1e-3, 1e-2))
    assert again.losses == found.losses


def test_a_dry_run_counts_the_trained_parameters(settings):
    told = dry_run(train_config(**settings, **MLP, dry_run=True, num_virtual_tokens=3))
    kind = "reparameterized (mlp, --encoder_hidden_size 16), saved as 3 × 32 values"
    count = sum(parameter.numel() for parameter in MLPEncoder(torch.zeros(3, 32), 16).parameters())
    assert f"parameters  {count:,} learned ({kind}), " in told
