"""Rows of a padded batch are what they are alone, whatever a base counts: positions, places, a window's width."""

import pytest
import torch
from helpers.peers import answers_of, greedy_alone, naive_loss, random_examples
from helpers.small_bases import WINDOW, small_base

from softprompt.data.tokenization import Example, count_targets
from softprompt.engines.factory import padded_engine
from softprompt.generation.requests import GenerationSettings
from softprompt.models.loading import freeze
from softprompt.prompt.soft_prompt import PromptEmbedding

KINDS = pytest.mark.parametrize(
    "kind", ["mistral", "qwen2", "gemma2", "gemma3_text", "mpt", "gpt2", "gpt_neo", "llama4_text"]
)


def rows_across_the_window(seed):
    rows = random_examples(4, 3 * WINDOW, seed=seed) + random_examples(2, 3, seed=seed)
    assert max(len(row.input_ids) for row in rows) > WINDOW
    return [*rows, Example([9, 8, 7], [9, 8, 7])]  # whose first token the last virtual token predicts


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@KINDS
@pytest.mark.parametrize("P", [1, 3, WINDOW + 2])
def test_loss_and_gradient_are_those_of_rows_run_alone(kind, P, tokenizer):
    base, rows, start = freeze(small_base(kind), torch.float32), rows_across_the_window(P), torch.randn(P, 32)
    values = start.clone().requires_grad_()
    expected = naive_loss(base, values, rows)
    expected.backward()
    targets, prompt = sum(map(count_targets, rows)), PromptEmbedding(start)
    for tokens, recompute in ((40, False), (10_000, False), (40, True)):
        prompt.weight.grad = None
        engine = padded_engine(base, tokenizer, torch.float32, tokens, recompute)
        total, count = engine.accumulate(prompt, rows, 1 / targets)
        assert count == targets and total.item() / targets == pytest.approx(expected.item(), rel=1e-5)
        assert relative(prompt.weight.grad, values.grad) < 1e-5
    evaluated, _ = engine.evaluate(start, rows)
    assert evaluated.item() == pytest.approx(total.item(), rel=1e-5)
    alone = [naive_loss(base, start, [row]).item() * count_targets(row) for row in rows]
    assert engine.row_losses(start, rows) == pytest.approx(alone, rel=1e-4)


@KINDS
def test_in_bf16_a_neighbour_changes_nothing_but_rounding(kind, tokenizer):
    base, rows = freeze(small_base(kind), torch.bfloat16), rows_across_the_window(5)
    grads = []
    for tokens in (1, 10_000):
        prompt = PromptEmbedding(torch.randn(3, 32, generator=torch.Generator().manual_seed(1)))
        padded_engine(base, tokenizer, torch.bfloat16, tokens).accumulate(prompt, rows, 1.0)
        grads.append(prompt.weight.grad)
    assert relative(grads[1], grads[0]) < 0.03  # before, a row lost its prompt, and with it most of this


@KINDS
def test_answers_of_texts_of_any_length_are_those_of_each_alone(kind, tokenizer):
    base, draw = small_base(kind, seed=1), torch.Generator().manual_seed(3)
    prompt = torch.randn(3, 32, generator=draw)
    texts = [torch.randint(5, 300, (n,), generator=draw).tolist() for n in (2, 3 * WINDOW, WINDOW, WINDOW + 5)]
    asked = [(text, front) for text in texts for front in (prompt, None)]
    answers = answers_of("padded", base, tokenizer, asked, GenerationSettings(max_new_tokens=9, do_sample=False))
    assert answers == [greedy_alone(base, text, front, 9) for text, front in asked]
