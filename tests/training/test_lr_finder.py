"""--find_learning_rate: how a sweep compares rates, what it prints if it finds none, and that a run keeps its rate."""

import json
import math
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.bases import make_bloom
from helpers.peers import naive_loss, random_examples

import softprompt
from softprompt.config.loader import train_config
from softprompt.config.train_args import RANDOM_LEARNING_RATE, TrainingArguments
from softprompt.data.dataloader import ListLoader, total_steps
from softprompt.data.tokenization import Example
from softprompt.engines.bloom_schedule import MicrobatchMajor
from softprompt.engines.microbatch_engine import MicrobatchEngine
from softprompt.models.bloom_weights import ResidentWeights
from softprompt.models.loading import freeze
from softprompt.prompt.soft_prompt import PromptEmbedding
from softprompt.training import lr_finder
from softprompt.training.dry_run import dry_run
from softprompt.training.loop import train
from softprompt.training.lr_finder import (
    RATES,
    RUNGS,
    find_learning_rate,
    rates_for,
    set_aside,
    short_schedule,
    successive_halving,
    sweep_steps,
)
from softprompt.utils.errors import ConfigError, Stopped, TrainingError

ARGS = TrainingArguments(per_device_train_batch_size=4, gradient_accumulation_steps=1, max_steps=24)
# Rows whose loss falls faster the larger the rate is.
QUICKER = [Example([5, 6, 7, 8], [-100, -100, 9, 9])] * 70


class Never:
    exit_code = None


class Quiet:
    def on_step(self, step): ...
    def on_log(self, metrics): ...
    def on_save(self, step, state): ...
    def on_evaluate(self, step):
        return False

    def wants_to_stop(self):
        return False


@pytest.fixture(scope="module")
def base():
    return freeze(make_bloom(), torch.float32)


def sweep(base, rows, args=ARGS, start=None, request=Never, **search):
    engine = MicrobatchEngine(MicrobatchMajor(ResidentWeights(base, torch.float32)), 200)
    start = PromptEmbedding(torch.zeros(3, 32)) if start is None else start
    return find_learning_rate(engine, start, rows, args, total_steps(len(rows), args), 4, request, **search)


def test_sweep_is_successive_halving_over_separate_runs(base):
    """Compared with training at each rate from scratch on the rows not set aside, evaluated by a naive loss."""
    rows = random_examples(70, 9)
    found = sweep(base, rows, rates=RATES[::-1])  # the last rates are the better ones here
    aside, rest = set_aside(rows, ARGS.seed)
    engine = MicrobatchEngine(MicrobatchMajor(ResidentWeights(base, torch.float32)), 200)
    left, expected = list(RATES[::-1]), {}
    for share, most in RUNGS:
        left = left[:most]
        steps = max(lr_finder.LEAST_STEPS, math.ceil(24 * share))
        for rate in left:
            prompt = PromptEmbedding(torch.zeros(3, 32))
            short = replace(ARGS, max_steps=steps)
            train(engine, prompt, ListLoader(rest, short), short, rate, Quiet())
            with torch.no_grad():
                expected[rate] = naive_loss(base, prompt.weight, aside).item()
        left = sorted(left, key=expected.get)
    assert found.losses == pytest.approx(expected, rel=1e-5)
    close = [rate for rate in left if expected[rate] <= expected[left[0]] * (1 + lr_finder.TIE)]
    assert found.learning_rate == min(close)
    assert found.start == pytest.approx(naive_loss(base, torch.zeros(3, 32), aside).item(), rel=1e-5)
    assert found == sweep(base, rows, rates=RATES[::-1])


def test_smallest_of_nearly_equal_rates_is_taken(base):
    chosen = []
    for tie in (0.0, 1e9):
        found = sweep(base, QUICKER, tie=tie)
        chosen.append(found.learning_rate)
    at_last = sorted(RATES, key=found.losses.get)[: RUNGS[-1][1]]
    assert chosen == [at_last[0], min(at_last)] and chosen[1] < chosen[0]


def test_sweep_does_not_change_the_initial_prompt(base):
    start = PromptEmbedding(torch.zeros(3, 32))
    sweep(base, random_examples(70, 9), start=start)
    assert not start.weight.any() and start.weight.grad is None


def test_sweep_steps_is_the_number_of_steps_taken(base):
    steps = []
    engine = MicrobatchEngine(MicrobatchMajor(ResidentWeights(base, torch.float32)), 200)
    rows = random_examples(70, 5)
    find_learning_rate(engine, PromptEmbedding(torch.zeros(2, 32)), rows, ARGS, 24, 4, Never, lambda: steps.append(1))
    assert len(steps) == sweep_steps(24)
    assert sweep_steps(1000) < 1000


def test_sweep_needs_enough_rows(base):
    found = sweep(base, random_examples(63, 5))
    assert found.learning_rate is None and "63 rows are too few" in found.why and not found.losses


def test_answers_to_one_question_are_on_one_side():
    rows = [Example([5, number, 6], [-100, -100, 6]) for number in range(40) for _ in range(3)]
    held, rest = set_aside(rows, seed=0)
    assert 20 < len(held) <= 30 and len(held) + len(rest) == 120
    assert {row.input_ids[1] for row in held}.isdisjoint(row.input_ids[1] for row in rest)
    held, rest = set_aside(QUICKER, seed=0)  # all have the same question
    assert len(held) == 17 and len(rest) == 53


@pytest.mark.parametrize(
    "default, lowest",
    [(None, 1e-3), (0.03, 1e-3), (0.2, 1e-3), (0.3, 1e-2), (1e-3, 1e-4), (3e-4, 1e-4), (0.4, 1e-2), (5.0, 1e-1)],
)
def test_the_rates_reach_below_the_default_and_above_it(default, lowest):
    rates = rates_for(default)
    assert rates[0] == lowest and len(rates) == len(RATES) and (default is None or rates[0] < default < rates[-1])


def test_no_rate_is_found_if_none_lowers_the_loss(base):
    found = sweep(base, random_examples(70, 5), rates=(1e-9, 1e-8))
    assert found.learning_rate is None and found.why == "no rate lowered the loss within the sweep"


@pytest.mark.parametrize(
    "longer, slope, found", [(0.3, 1.0, 0.3), (0.1, 1.0, 0.1), (0.03, 1.0, None), (0.03, 0.001, 0.03)]
)
def test_no_rate_is_found_if_the_best_changes_too_much(longer, slope, found):
    """In the shorter rung, 0.3 is the best. A best rate that moves to a neighbor in the longer rung is found. One that
    moves further is found only if the loss hardly depends on the rate."""
    trained = set()

    def loss_after(rate, steps):
        trained.add(steps)
        return 1 + slope * abs(math.log(rate / (0.3 if steps == 20 else longer)))

    swept = successive_halving(9.0, loss_after, 400)
    assert swept.learning_rate == found and trained == {20, 40}
    told = "contradict each other: 0.3 was best in the shorter ones, 0.03 in the longer"
    assert (told in swept.why) == (found is None)


def test_diverging_rate_loses(base):
    found = sweep(base, random_examples(70, 5), replace(ARGS, max_grad_norm=0.0), rates=(1e-2, 1e38, 1e-1))
    assert found.losses[1e38] == math.inf and found.learning_rate in (1e-2, 1e-1)


def test_error_unrelated_to_the_rate_ends_the_sweep(base, monkeypatch):
    """For example a rank that died. A rank that went on with the next rate would wait for it forever."""

    def died(*args):
        raise TrainingError("rank 0: rank 1 died")

    monkeypatch.setattr(MicrobatchEngine, "accumulate", died)
    with pytest.raises(TrainingError, match="rank 1 died"):
        sweep(base, random_examples(70, 5))


@pytest.mark.parametrize("given, meant", [(0, 0), (0.25, 0.25), (6, 0.25), (24, 0.99)])
def test_warmup_keeps_its_share_of_the_steps(given, meant):
    assert short_schedule(replace(ARGS, warmup_steps=given), 5, 24).warmup_steps == meant


def test_find_learning_rate_excludes_learning_rate():
    with pytest.raises(ConfigError, match="--find_learning_rate and --learning_rate exclude each other"):
        train_config(find_learning_rate=True, learning_rate=0.1)
    assert train_config("article", find_learning_rate=True).training.find_learning_rate


@pytest.fixture
def settings(tmp_path, tiny_base):
    rows = [{"instruction": f"{word}{n}", "output": word} for n in range(25) for word in ("好", "坏", "hm")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return {
        "model_name_or_path": str(tiny_base),
        "dataset": str(tmp_path / "rows.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": 6,
        "save_steps": 3,
        "num_virtual_tokens": 3,
        "eval_rows": 3,
    }


def found_in(out: str) -> float:
    return float(re.search(r"^learning rate (\S+) is taken$", out, re.M)[1])


def test_run_records_the_found_rate_and_equals_a_run_at_that_rate(settings, tmp_path, capsys):
    ended = softprompt.train(**settings, find_learning_rate=True)
    out = capsys.readouterr().out
    rate = found_in(out)
    assert "learning rate to be found (linear)" in out and rate in RATES
    folder = ended.output_dir
    state = json.loads((folder / "checkpoint-3" / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["arguments"]["learning_rate"] == rate and state["arguments"]["find_learning_rate"] is True
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"at a peak learning rate of {rate:g}." in card and "| find_learning_rate | true |" in card
    first = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["learning_rate"] == rate and set(map(float, first["sweep"])) == set(RATES)
    plain = softprompt.train(**{**settings, "output_dir": str(tmp_path / "plain")}, learning_rate=rate)
    name = "adapter_model.safetensors"
    assert (folder / name).read_bytes() == (plain.output_dir / name).read_bytes()


def test_the_rates_do_not_depend_on_the_rate_of_a_preset(settings, capsys):
    softprompt.train(**settings, preset="article", find_learning_rate=True)
    assert found_in(capsys.readouterr().out) in rates_for(RANDOM_LEARNING_RATE)


def test_a_sweep_is_only_announced_if_it_takes_place(settings, tmp_path, capsys):
    rows = Path(settings["dataset"]).read_text(encoding="utf-8").splitlines()[:66]
    Path(settings["dataset"]).write_text("\n".join(rows), encoding="utf-8")
    assert "sweep" not in dry_run(train_config(**settings, find_learning_rate=True))
    softprompt.train(**settings, find_learning_rate=True)
    out = capsys.readouterr().out
    assert "63 rows are too few" in out and "looking for a learning rate" not in out


@pytest.mark.parametrize("again", [{}, {"find_learning_rate": True}])
def test_resumed_run_does_not_sweep_again(again, settings, tmp_path, monkeypatch, capsys):
    name = "adapter_model.safetensors"
    whole = softprompt.train(**settings, find_learning_rate=True)
    rate = found_in(capsys.readouterr().out)
    ended = (whole.output_dir / name).read_bytes()

    def not_again(*args):
        raise AssertionError("it looked again")

    monkeypatch.setattr(lr_finder, "find_learning_rate", not_again)
    where = {"resume_from_checkpoint": str(whole.output_dir / "checkpoint-3"), "output_dir": str(tmp_path / "other")}
    resumed = softprompt.train(**where, **again)
    assert (resumed.output_dir / name).read_bytes() == ended
    assert resumed.config.training.learning_rate == rate
    assert f"learning rate {rate:g} (linear)" in capsys.readouterr().out
    assert "| find_learning_rate | true |" in (resumed.output_dir / "README.md").read_text(encoding="utf-8")
    assert "sweep" in (resumed.output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0]


def test_resuming_does_not_start_a_sweep(settings, monkeypatch, capsys):
    softprompt.train(**settings)
    capsys.readouterr()
    resumed = softprompt.train(resume_from_checkpoint=settings["output_dir"], find_learning_rate=True)
    assert "the checkpoint's wins" in capsys.readouterr().out
    assert resumed.config.training.find_learning_rate is False


def test_default_rate_is_used_if_none_is_found(settings, capsys):
    ended = softprompt.train(**{**settings, "eval_rows": 15}, find_learning_rate=True)
    told = "warning: --find_learning_rate found none: 60 rows are too few"
    assert told in capsys.readouterr().out and ended.config.training.learning_rate == 1e-1


def test_signal_during_a_sweep_stops_the_run(settings, monkeypatch, tmp_path):
    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return train(*args, **kwargs)

    monkeypatch.setattr(lr_finder, "train", interrupted)
    with pytest.raises(Stopped, match="while looking for a learning rate") as stopped:
        softprompt.train(**settings, find_learning_rate=True)
    assert stopped.value.exit_code == 143 and not list((tmp_path / "run").glob("checkpoint-*"))
