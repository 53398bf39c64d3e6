"""Real pre-trained bases beside PEFT + Trainer. Slow: run with `SOFTPROMPT_REAL_BASES=FOLDER pytest -m slow
tests/test_real_bases.py`, where FOLDER holds smollm2-135m-instruct and gemma-3-270m as plain transformers folders."""

import json
import os
from itertools import chain
from pathlib import Path

import peft
import pytest
import torch
from helpers.peers import peft_model
from helpers.trainer_runs import Recorder, peer_run

import softprompt
from softprompt.config.train_args import TrainingArguments
from softprompt.data.dataloader import ListLoader
from softprompt.data.dataset import load_rows
from softprompt.data.template import Template
from softprompt.data.tokenization import tokenize
from softprompt.engines.factory import packed_engine
from softprompt.generation.generator import in_request_order
from softprompt.generation.requests import GenerationSettings, Request
from softprompt.models.loading import load_base, load_tokenizer
from softprompt.prompt.adapter_io import load_adapter
from softprompt.prompt.soft_prompt import InputEmbeddings, PromptEmbedding, sample_vocab_init
from softprompt.training.loop import train

pytestmark = pytest.mark.slow


@pytest.fixture
def bases() -> Path:
    if "SOFTPROMPT_REAL_BASES" not in os.environ:
        pytest.skip("needs the folder of real bases that SOFTPROMPT_REAL_BASES names")
    return Path(os.environ["SOFTPROMPT_REAL_BASES"])


@pytest.mark.parametrize(("name", "steps"), [("smollm2-135m-instruct", 10), ("gemma-3-270m", 3)])
def test_losses_of_every_step_are_those_of_peft_and_trainer(name, steps, bases, shared, tmp_path):
    path = str(bases / name)
    base, tokenizer = load_base(path, torch.device("cpu"), torch.float32), load_tokenizer(path)
    tokenizer.padding_side = "right"  # on the left, the pads would stand between PEFT's prompt and the text
    texts = load_rows(str(shared / "data" / "hotel_reviews_train.jsonl"), Template(), {})[:160]
    rows = tokenize(texts, tokenizer, Template(), 128).examples
    torch.manual_seed(0)
    values = sample_vocab_init(10)(InputEmbeddings(base)).float()
    settings = {"max_steps": steps, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    theirs, history = peer_run(base, tokenizer, values, rows, tmp_path, learning_rate=1e-2, **settings)
    args, prompt, kept = TrainingArguments(**settings), PromptEmbedding(values), Recorder()
    train(packed_engine(base, torch.float32), prompt, ListLoader(rows, args), args, 1e-2, kept)
    assert len(kept.steps) == len(history) == steps
    for step, record in zip(kept.steps, history, strict=True):
        assert step.loss == pytest.approx(record["loss"], abs=1e-4)
    moved = prompt.weight.detach() - values
    assert moved.abs().max() > 1e-3 and (prompt.weight.detach() - theirs).norm() < 0.02 * moved.norm()


ASKED = ("Say yes.", "What is the capital of France?", "Write a short poem about the sea and the wind.", "1 + 1 =")


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma-3-270m"])
def test_adapters_and_greedy_answers_are_those_of_peft(name, bases, tmp_path):
    """Token for token, one by one and in batches in which each question has another prompt."""
    rows = [{"instruction": f"Say {word}.", "output": word} for word in ("yes", "no", "maybe", "never") * 4]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path, run = str(bases / name), str(tmp_path / "run")
    softprompt.train(
        model_name_or_path=path, dataset=str(tmp_path / "rows.jsonl"), output_dir=run, max_steps=2, learning_rate=1e-2
    )
    base, tokenizer = load_base(path, torch.device("cpu"), torch.float32), load_tokenizer(path)
    texts = [tokenizer(Template().render({"instruction": text}, tokenizer))["input_ids"] for text in ASKED]
    learned = load_adapter(run).prompt
    shorter = learned[:4].flip(0)
    own = [answers_alone(base, tokenizer, texts), answers_alone(peft_model(base, shorter), tokenizer, texts)]
    theirs = peft.PeftModel.from_pretrained(base, run).eval()
    expected = list(chain(*zip(answers_alone(theirs, tokenizer, texts), *own, strict=True)))
    assert len(set(map(tuple, expected))) > len(ASKED)
    settings = GenerationSettings(do_sample=False, max_new_tokens=16)
    requests = [Request(ids, settings, prompt) for ids in texts for prompt in (learned, None, shorter)]
    ours = softprompt.SoftPromptModel.from_pretrained(path, run)
    assert str(ours.generator) == "packed engine"
    for batch_size in (1, 5, len(requests)):
        assert list(in_request_order(ours.generator.generate(requests, batch_size))) == expected
    theirs.save_pretrained(tmp_path / "back")
    back = softprompt.SoftPromptModel.from_pretrained(path, str(tmp_path / "back"))
    assert torch.equal(back.adapters[back.active_adapter].prompt, learned)
    assert back.generate(ASKED, do_sample=False, max_new_tokens=16) == [
        tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in expected[::3]
    ]


def answers_alone(model, tokenizer, texts):
    """Greedy answers by transformers' generate, each text alone, without their end tokens."""
    answers, end = [], tokenizer.eos_token_id
    for text in texts:
        ids = torch.tensor([text])
        settings = {"do_sample": False, "max_new_tokens": 16, "eos_token_id": end, "pad_token_id": end}
        settings["use_cache"] = False  # peft 0.21's cached answers differ
        answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)[0, len(text) :].tolist()
        answers.append(answer[: answer.index(end)] if end in answer else answer)
    return answers
