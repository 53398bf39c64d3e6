"""CUDA graphs of decoding steps, played on the CPU: a graph runs the same step again on what lies in its inputs."""

import pytest
import torch
from helpers.bases import make_bloom
from helpers.peers import greedy_alone
from helpers.small_bases import WINDOW, small_base

from softprompt.engines.factory import engine_for_inference
from softprompt.generation import continuous_batching, cuda_graphs
from softprompt.generation.cuda_graphs import DecodeGraphs
from softprompt.generation.generator import in_request_order, make_generator
from softprompt.generation.requests import GenerationSettings, Request

GREEDY = GenerationSettings(max_new_tokens=3 * WINDOW, do_sample=False)


def played(captured, forward):
    """`forward` with graphs. A graph may not depend on what a step says beside the tensors that it reads."""

    def record(run):
        captured.append(run())
        result = captured[-1]

        def replay():
            return result.copy_(run())

        return replay

    return DecodeGraphs(forward, record=record)


def ask(base, tokenizer, batch_size=4):
    """Answers to texts of several lengths, with and without prompts, and those by definition. There are more texts than
    slots, so slots are refilled, and at the end the last ones move."""
    draw = torch.Generator().manual_seed(3)
    prompts = [None, *(torch.randn(P, base.config.hidden_size, generator=draw) for P in (1, 4))]
    texts = [torch.randint(5, 300, (n,), generator=draw).tolist() for n in (3, 20, 8, 1, 7, 16)]
    asked = [(text, prompts[i % 3]) for i, text in enumerate(texts)]
    generator = make_generator(
        engine_for_inference("packed", base, tokenizer, torch.float32), base, tokenizer, "packed"
    )
    answers = generator.generate([Request(text, GREEDY, prompt) for text, prompt in asked], batch_size)
    return list(in_request_order(answers)), [greedy_alone(base, *one, GREEDY.max_new_tokens) for one in asked]


@pytest.mark.parametrize("width", [4, 128])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("kind", ["bloom", "llama", "gemma2"])
def test_answers_are_the_same_with_graphs(kind, batch_size, width, tokenizer, monkeypatch):
    base, captured = (make_bloom() if kind == "bloom" else small_base(kind, seed=1)), []
    base.requires_grad_(False)
    monkeypatch.setattr(cuda_graphs, "WIDTH", width)
    monkeypatch.setattr(continuous_batching, "with_graphs", lambda forward, device: played(captured, forward))
    answers, expected = ask(base, tokenizer, batch_size=batch_size)
    assert answers == expected and len(captured) >= 1


def test_what_cannot_be_captured_decodes_without_graphs(tokenizer, monkeypatch, capsys):
    base = small_base("llama", seed=1)

    def refuse(run):
        run()
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(
        continuous_batching, "with_graphs", lambda forward, device: DecodeGraphs(forward, record=refuse)
    )
    answers, expected = ask(base, tokenizer)
    assert answers == expected
    assert capsys.readouterr().err.count("cannot be captured") == 1
