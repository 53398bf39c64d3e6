"""Real rows and a small real base, for those who have them (SOFTPROMPT_SHARED): readable, and equal to PEFT on them."""

import json

import pytest
import torch
from helpers.peers import collated, peft_model, peft_prompt

from softprompt.data.dataset import load_rows
from softprompt.data.template import Template
from softprompt.data.tokenization import count_targets, tokenize
from softprompt.engines.factory import padded_engine
from softprompt.models.loading import load_base, load_tokenizer
from softprompt.prompt.soft_prompt import PromptEmbedding, random_init


def test_a_step_of_real_rows_is_pefts(shared):
    rows = load_rows(str(shared / "data/alpaca_data_zh"), Template(), {})
    assert len(rows) == 26_858
    name = str(shared / "bloom-16m-zh")
    tokenizer = load_tokenizer(name)
    assert len(tokenizer) == 46_145 and tokenizer.padding_side == "left"
    base = load_base(name, torch.device("cpu"), torch.float32)
    window = tokenize(rows[:32], tokenizer, Template(), 256).examples
    values = random_init(10)(torch.empty(1, base.config.hidden_size))
    prompt = PromptEmbedding(values)
    targets = sum(map(count_targets, window))
    loss, count = padded_engine(base, tokenizer, torch.float32, 128).accumulate(prompt, window, 1 / targets)

    peer, peer_loss = peft_model(base, values), 0.0
    for start in range(0, 32, 4):
        batch = collated(window[start : start + 4], tokenizer.pad_token_id)
        out = peer(**batch._asdict(), num_items_in_batch=torch.tensor(targets))
        out.loss.backward()
        peer_loss += out.loss.item()
    assert count == targets
    assert loss.item() / targets == pytest.approx(peer_loss, rel=1e-5)
    gradient = peft_prompt(peer).grad
    assert ((prompt.weight.grad - gradient).norm() / gradient.norm()).item() < 3e-5


def test_long_reviews_lose_their_answer_or_keep_it(shared):
    source = shared / "data/hotel_reviews_train.jsonl"
    rows = load_rows(str(source), Template(), {})
    assert len(rows) == len([line for line in source.read_text(encoding="utf-8").splitlines() if json.loads(line)])
    tokenizer = load_tokenizer(str(shared / "tokenizer-46k"))
    plain = tokenize(rows, tokenizer, Template(), 256)
    kept = tokenize(rows, tokenizer, Template(), 256, "input")
    assert plain.without_target > 100 and len(plain.examples) == len(rows) - plain.without_target
    assert kept.without_target == 0 and kept.cut == plain.cut
    assert max(len(e.input_ids) for e in kept.examples) <= 256
