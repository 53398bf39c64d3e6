"""Runs that distill a text: what they learn and measure, write and show."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.distillation import QUESTIONS, TEXT
from helpers.programs import run_infer
from helpers.quantized import base_to_quantize, saved
from helpers.serving import running_server
from helpers.small_bases import small_base
from transformers import AutoModelForCausalLM, AutoTokenizer

import softprompt
from softprompt.config.loader import train_config
from softprompt.data.examples import count_targets
from softprompt.evaluation import distillation as evaluation
from softprompt.export import export
from softprompt.models.loading import load_tokenizer
from softprompt.prompt.adapter_io import load_adapter
from softprompt.training.dry_run import _predictions_bytes, dry_run
from softprompt.training.question_setup import identity_of
from softprompt.training.setup import Base
from softprompt.training.summary import summary
from softprompt.utils.errors import SoftpromptError


def log_probabilities(base, before, ids, answer):
    """Those at the tokens of `answer` behind the embeddings `before` and the token ids `ids`: [n, V]."""
    words = base.get_input_embeddings()(torch.tensor([*ids, *answer]))
    logits = base(inputs_embeds=torch.cat([before, words])[None]).logits[0]
    return logits[len(before) + len(ids) - 1 : -1].log_softmax(-1)


@torch.no_grad()
def naive_figures(base, tokenizer, rows, prompt):
    """KL and agreement of a prompt [P, H], over rows (ids without the text, ids with it, answer)."""
    total = agree = tokens = 0
    for plain, with_text, answer in rows:
        theirs = log_probabilities(base, prompt[:0], with_text, answer)
        ours = log_probabilities(base, prompt, plain, answer)
        total += (theirs.exp() * (theirs - ours)).sum().item()
        agree += int((theirs.argmax(-1) == ours.argmax(-1)).sum())
        tokens += len(answer)
    return total / tokens, agree / tokens


def test_the_figures_are_those_of_questions_run_alone(distillation):
    run = softprompt.train(**distillation)
    tokenizer, base = load_tokenizer(distillation["model_name_or_path"]), run.setup.base
    text, rows = tokenizer(TEXT + "\n", add_special_tokens=False)["input_ids"], []
    for question, row in zip(QUESTIONS[-3:], run.setup.data.held_out.examples, strict=True):
        plain = tokenizer(f"Human: {question}\n\nAssistant: ", add_special_tokens=False)["input_ids"]
        answer = row.input_ids[len(plain) :]
        # The teacher's answer is the base's greedy one behind the text.
        whole = torch.tensor([[*text, *plain]])
        greedy = base.generate(whole, do_sample=False, max_new_tokens=5, pad_token_id=3)[0, whole.shape[1] :].tolist()
        assert row.input_ids[: len(plain)] == plain and answer == greedy
        rows.append((plain, [*text, *plain], answer))
    prompt = load_adapter("run").prompt
    for suffix, values in (("", prompt), ("_base", prompt[:0])):
        kl, agreement = naive_figures(base, tokenizer, rows, values)
        assert run.metrics[f"eval_kl{suffix}"] == pytest.approx(kl, rel=1e-3, abs=1e-5)
        assert run.metrics[f"eval_agreement{suffix}"] == pytest.approx(agreement)
    cut = [(text[:4] + plain, whole, answer) for plain, whole, answer in rows]
    kl, agreement = naive_figures(base, tokenizer, cut, prompt[:0])
    assert run.metrics["eval_kl_cut"] == pytest.approx(kl, rel=1e-3)
    assert run.metrics["eval_agreement_cut"] == pytest.approx(agreement)
    assert run.metrics["tokens_saved"] == len(text) - 4
    assert run.metrics["eval_kl_low"] < run.metrics["eval_kl"] == run.metrics["eval_loss"]
    assert run.metrics["eval_kl"] < run.metrics["eval_kl_base"] and "eval_perplexity" not in run.metrics


class TimedGenerator:
    """A generator that takes a second for each token of a request, virtual ones included, on a clock of its own."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def generate(self, requests, *more):
        for number, request in enumerate(requests):
            assert request.settings.max_new_tokens == 1
            self.now += len(request.input_ids) + (0 if request.prompt is None else len(request.prompt))
            yield number, [5]


def test_the_times_to_the_first_token_are_not_swapped(distillation, monkeypatch):
    run = softprompt.train(**distillation)
    clock = TimedGenerator()
    monkeypatch.setattr(evaluation, "time", clock)
    found = replace(run.evaluator, generator=clock).costs(run.setup.prompt.weight.detach())
    tokenizer = load_tokenizer(distillation["model_name_or_path"])
    asked = f"Human: {QUESTIONS[-3]}\n\nAssistant: "
    question, text = (len(tokenizer(each, add_special_tokens=False)["input_ids"]) for each in (asked, TEXT + "\n"))
    assert found["time_to_first_token"] == question + 4 and found["time_to_first_token_text"] == question + text
    assert found["tokens_saved"] == text - 4


def test_each_time_to_the_first_token_is_shown_under_its_name(distillation, monkeypatch):
    costs = {"tokens_saved": 7, "time_to_first_token": 0.125, "time_to_first_token_text": 0.5}
    monkeypatch.setattr(evaluation.DistillationEvaluator, "costs", lambda self, prompt: costs)
    monkeypatch.setenv("COLUMNS", "200")
    (line,) = [line for line in summary(softprompt.train(**distillation)).splitlines() if "first token" in line]
    assert line.split("  ")[-1].strip() == "0.500 → 0.125"
    lines = Path("run/README.md").read_text().splitlines()
    row = next(n for n, each in enumerate(lines) if each.startswith("| seconds to the first token |"))
    head = next(each for each in reversed(lines[:row]) if "with the prompt" in each)
    cells = dict(zip(*([cell.strip() for cell in each.split("|")] for each in (head, lines[row])), strict=True))
    assert cells["whole text"] == "0.500" and cells["text cut"] == ""
    assert next(value for name, value in cells.items() if name.startswith("with the prompt")) == "0.125"
    page = Path("run/report.html").read_text()
    figures = page[page.index("tokens saved per request") :]
    assert 0 < figures.index(">7<") < figures.index("0.125") < figures.index("0.500")


def test_it_is_shown_and_it_is_an_ordinary_adapter(distillation, capsys, monkeypatch, tmp_path):
    run = softprompt.train(**{**distillation, "distill_prompt": str(tmp_path / "text.txt")})
    monkeypatch.setenv("COLUMNS", "200")
    text = summary(run)
    for shown in ("KL per token", "text cut", "tokens saved per request", "with the text"):
        assert shown in text
    assert "too few" in run.verdict.sentence and "first 4 tokens of the text" in run.verdict.sentence
    assert [row.question for row in run.answered_rows] == [f"Human: {q}\n\nAssistant:" for q in QUESTIONS[-3:]]
    page, card = Path("run/report.html").read_text(), Path("run/README.md").read_text()
    for shown in (f"{run.metrics['eval_kl']:.4f}", f"{run.metrics['eval_kl_cut']:.4f}"):
        assert shown in page and shown in card
    assert "| with the text |" in card and "held-out loss" not in card
    out = run_infer(["--adapter", "run", "--prompt", QUESTIONS[0], "--max_new_tokens", "3"], capsys, monkeypatch)
    assert out.strip()
    saved = json.loads(Path("run/adapter_config.json").read_text())
    assert saved["prompt_tuning_init"] == "TEXT" and TEXT.startswith(saved["prompt_tuning_init_text"])
    assert "distill" not in Path("run/softprompt.json").read_text()
    assert str(tmp_path) not in card


def test_it_is_exported_served_mixed_and_voted_with_like_any_other(distillation):
    softprompt.train(**distillation)
    softprompt.train(**{**distillation, "output_dir": "other", "seed": 7})
    model = softprompt.SoftPromptModel.from_pretrained(None, {"one": "run", "other": "other"})
    how = {"do_sample": False, "max_new_tokens": 4}
    alone = [model.generate(QUESTIONS[0], adapter=name, **how) for name in ("one", "other", "none")]
    assert model.generate([QUESTIONS[0]] * 3, adapter=["one", "other", "none"], **how) == alone
    assert set(model.ensemble().generate(QUESTIONS[:2], **how)) and model.classify(QUESTIONS[0], ["好", "坏"])
    export("run", "plain")
    plain, tokenizer = AutoModelForCausalLM.from_pretrained("plain"), AutoTokenizer.from_pretrained("plain")
    text = tokenizer.apply_chat_template([{"role": "user", "content": QUESTIONS[0]}], tokenize=False)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    answer = plain.generate(ids, do_sample=False, max_new_tokens=4)[0, ids.shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True).strip() == alone[0]
    with running_server(model, "run") as server:
        assert server.ask("run", QUESTIONS[0], temperature=0, max_tokens=4).strip() == alone[0]


def test_dry_run_and_search_of_a_learning_rate(distillation, tmp_path):
    told = dry_run(train_config(**distillation, dry_run=True))
    assert not Path("run").exists()
    for part in ("12 with", "are kept for the run", "the predictions with the text"):
        assert part in told
    many = "\n".join(f"{q}{i}" for q in QUESTIONS for i in range(5))
    Path("questions.txt").write_text(many, encoding="utf-8")
    run = softprompt.train(**distillation, find_learning_rate=True)
    assert "sweep" in run.history[0]
    targets = sum(map(count_targets, [*run.setup.data.train.examples, *run.setup.data.held_out.examples]))
    H = run.setup.prompt.weight.shape[1]
    assert _predictions_bytes(run.setup) == targets * (4 * H + 4 + 8)  # a vector, an entropy and a token id


def test_a_base_whose_head_is_not_plain(distillation, tokenizer, capsys):
    small_base("gemma2", max_position_embeddings=60).save_pretrained("gemma2")
    tokenizer.save_pretrained("gemma2")
    run = softprompt.train(**{**distillation, "model_name_or_path": "gemma2"})
    assert run.metrics["eval_kl"] < run.metrics["eval_kl_base"]
    assert "more than the 60 positions that the base was trained on" in capsys.readouterr().out


def test_a_quantized_base_has_answers_of_its_own(distillation):
    base, each = Base(None, None, {"base": "a hash"}), [{}, {"load_in_8bit": True}, {"load_in_4bit": True}]
    assert len({str(identity_of(train_config(**distillation, **more), base, "a hash")) for more in each}) == 3


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", ["bloom", "llama"])
def test_a_quantized_base_is_distilled(kind, bits, distillation, tokenizer):
    """Teacher and student are the quantized base; a BLOOM is run layer by layer."""
    pytest.importorskip("bitsandbytes", reason="needs pip install bitsandbytes")
    pytest.importorskip("accelerate", reason="needs pip install accelerate")
    saved(base_to_quantize(kind), Path("base"), tokenizer)
    run = softprompt.train(**{**distillation, "model_name_or_path": "base", f"load_in_{bits}bit": True})
    base, text, rows = run.setup.base, tokenizer(TEXT + "\n", add_special_tokens=False)["input_ids"], []
    for ids, labels in run.setup.data.held_out.examples:
        question, answer = ids[: labels.count(-100)], ids[labels.count(-100) :]
        rows.append((question, [*text, *question], answer))
    kl, agreement = naive_figures(base, None, rows, load_adapter("run").prompt)
    assert run.metrics["eval_kl"] == pytest.approx(kl, rel=1e-3, abs=1e-5)
    assert run.metrics["eval_agreement"] == pytest.approx(agreement)


def test_another_prompt_to_start_from(distillation):
    """It decides the number of virtual tokens, and so how far the text is cut."""
    first = softprompt.train(**distillation)
    del distillation["num_virtual_tokens"]
    second = softprompt.train(**{**distillation, "init_adapter": "run", "output_dir": "second"})
    assert len(second.setup.prompt.weight) == 4
    assert second.metrics["eval_kl_cut"] == first.metrics["eval_kl_cut"] > 1e-3
    Path("text.txt").write_text("a")
    with pytest.raises(SoftpromptError, match="fewer than the 4 virtual tokens"):
        softprompt.train(**{**distillation, "init_adapter": "run", "output_dir": "third"})


def test_metrics_of_distillation_need_it(distillation):
    plain = {name: value for name, value in distillation.items() if not name.startswith("distill")}
    with pytest.raises(SoftpromptError, match="only computed with --distill_prompt"):
        softprompt.train(**plain, metric_for_best_model="kl")


def test_answers_that_do_not_end_are_counted(distillation, capsys):
    run = softprompt.train(**{**distillation, "distill_max_new_tokens": 1})
    said = capsys.readouterr().out
    assert "do not end within --distill_max_new_tokens 1" in said
    assert run.metrics["answers"] == 15 and 0 < run.metrics["answers_not_ended"] <= 15


def test_the_report_says_what_is_compared_without_held_out_questions(distillation):
    softprompt.train(**{**distillation, "eval_rows": 0})
    page = Path("run/report.html").read_text()
    assert "with the text" in page and "that replace the text of text.txt" in page


@pytest.mark.slow
def test_the_preset_distills_a_request(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = softprompt.train("distill-mini")
    assert run.metrics["eval_kl"] < run.metrics["eval_kl_cut"] < run.metrics["eval_kl_base"]
    assert run.verdict.better and run.metrics["tokens_saved"] == 48
