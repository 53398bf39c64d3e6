"""The packed engine for any decoder: loss and gradient against each row run alone, and against PEFT."""

import copy
import itertools
import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from helpers.packed_cases import relative
from helpers.peers import gradient_of, naive_gradient, naive_loss, peft_gradient, random_examples
from helpers.small_bases import WINDOW, small_base

from softprompt.data.tokenization import Example, count_targets
from softprompt.engines import decoder_attention
from softprompt.engines.factory import packed_engine
from softprompt.engines.head import ModelHead
from softprompt.engines.self_check import GRADIENT_TOLERANCE, LOSS_TOLERANCE
from softprompt.engines.split_base import split_base
from softprompt.models.loading import freeze
from softprompt.utils.errors import ModelError

FP32, BF16 = torch.float32, torch.bfloat16
EXACT = [
    *("llama", "qwen2", "qwen2_full", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "gpt2", "phi3", "gpt_neox"),
    *("olmo2", "opt", "cohere", "granite", "mixtral", "gpt_oss"),
]
KINDS = pytest.mark.parametrize("kind", EXACT)


def rows_across_the_window(seed):
    """Rows shorter and longer than a window, one without targets, and one whose first token is a target."""
    rows = random_examples(4, 3 * WINDOW, seed=seed) + random_examples(2, 3, seed=seed)
    return [*rows, Example([5] * 4, [-100] * 4), Example([9, 8, 7], [9, 8, 7])]


@KINDS
@pytest.mark.parametrize("P", [1, 10, 100])
def test_loss_and_gradient_are_those_of_rows_run_alone(kind, P):
    base, rows = freeze(small_base(kind), FP32), rows_across_the_window(P)
    start = torch.randn(P, 32, generator=torch.Generator().manual_seed(P))
    mean, gradient = naive_gradient(base, start, rows)
    for tokens, recompute in ((25, False), (10_000, False), (25, True)):
        engine = packed_engine(base, FP32, tokens, recompute)
        ours, same = gradient_of(engine, start, rows)
        assert ours == pytest.approx(mean, rel=1e-5) and relative(same, gradient) < 1e-5
    evaluated, count = engine.evaluate(start, rows)
    assert evaluated.item() / count == pytest.approx(mean, rel=1e-5)
    alone = [naive_loss(base, start, [row]).item() * count_targets(row) if count_targets(row) else 0 for row in rows]
    assert engine.row_losses(start, rows) == pytest.approx(alone, rel=1e-4, abs=1e-6)


@KINDS
def test_one_row_and_the_base_without_a_prompt(kind):
    base, start = freeze(small_base(kind, seed=1), FP32), torch.randn(3, 32)
    row = random_examples(1, 2 * WINDOW, seed=7)
    mean, gradient = naive_gradient(base, start, row)
    engine = packed_engine(base, FP32, 100)
    ours, same = gradient_of(engine, start, row)
    assert ours == pytest.approx(mean, rel=1e-5) and relative(same, gradient) < 1e-5
    bare, count = engine.evaluate(None, row)
    assert bare.item() / count == pytest.approx(naive_loss(base, start[:0], row).item(), rel=1e-5)


@KINDS
@pytest.mark.parametrize("P", [1, 10, 100])
def test_it_computes_what_peft_computes(kind, P):
    base, start = small_base(kind, seed=2), torch.randn(P, 32, generator=torch.Generator().manual_seed(P))
    rows = random_examples(5, 2 * WINDOW, seed=3)
    expected, gradient = peft_gradient(base, start, rows)
    ours, same = gradient_of(packed_engine(freeze(base, FP32), FP32, 40), start, rows)
    assert ours == pytest.approx(expected, rel=1e-5) and relative(same, gradient) < 1e-5


@pytest.mark.parametrize(("P", "prompts"), [(1, 10), (10, 4), (100, 2)])
def test_bf16_is_no_further_from_fp32_than_pefts_autocast(P, prompts):
    """In the geometric mean over all kinds, as single prompts scatter (a router of experts may choose others), the more
    the shorter they are."""
    logs = []
    for kind, seed in itertools.product(EXACT, range(prompts)):
        base, rows = small_base(kind, seed=seed), random_examples(6, 2 * WINDOW, seed=seed)
        start = torch.randn(P, 32, generator=torch.Generator().manual_seed(seed))
        mean, truth = naive_gradient(base, start, rows)
        _, peer = peft_gradient(base, start, rows, BF16)
        ours, gradient = gradient_of(packed_engine(freeze(copy.deepcopy(base), BF16), BF16, 40), start, rows)
        assert ours == pytest.approx(mean, rel=0.05)
        logs.append(math.log(relative(gradient, truth) / relative(peer, truth)))
    assert statistics.fmean(logs) <= 0


def test_a_window_that_is_off_by_one_is_noticed(monkeypatch):
    """The rows do tell a window from one that is a position longer, and the prompt from none."""
    base, rows, start = freeze(small_base("mistral"), FP32), rows_across_the_window(1), torch.randn(3, 32)
    _, truth = naive_gradient(base, start, rows)
    visible = decoder_attention.visible
    monkeypatch.setattr(decoder_attention, "visible", lambda *args: visible(*args[:2], args[2] + 1))
    _, wrong = gradient_of(packed_engine(base, FP32, 50), start, rows)
    assert relative(wrong, truth) > 10 * GRADIENT_TOLERANCE[FP32]


@pytest.mark.parametrize("kind", ["gemma2", "gpt2"])
def test_a_head_that_is_also_the_embeddings_is_converted_to_bf16_once(kind, monkeypatch):
    """The embeddings stay in fp32, and all engines of a base share one copy."""
    base = freeze(small_base(kind, tie_word_embeddings=True), BF16)
    words, seen = base.get_input_embeddings().weight, []
    assert words.dtype is FP32 and base.get_output_embeddings().weight is words
    engines = [packed_engine(base, BF16, 40), packed_engine(base, BF16, 40)]
    heads = [engine.schedule.head for engine in engines]
    assert heads[0].weight.data_ptr() == heads[1].weight.data_ptr() and heads[0].weight.dtype is BF16
    assert heads[0].nbytes == 2 * words.numel()
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, weight, *rest: seen.append(weight.dtype) or linear(x, weight, *rest))
    rows = random_examples(3, 9, seed=1)
    gradient_of(engines[0], torch.randn(3, 32), rows)
    assert FP32 not in seen and base.get_output_embeddings().weight is words
    with torch.no_grad():
        words.mul_(2)
    assert not torch.equal(packed_engine(base, BF16, 40).schedule.head.weight, heads[0].weight)


@pytest.mark.parametrize("kind", ["gemma2", "cohere", "granite"])
@pytest.mark.parametrize("chunk", [1, 3, 50])
def test_other_heads_compute_chunks_of_their_own_logits(kind, chunk, monkeypatch):
    """A soft cap or a scale shows at large logits, however small those of the rows are."""
    base = small_base(kind)
    body, head = split_base(base, FP32)
    monkeypatch.setattr(ModelHead, "chunk", chunk)
    assert isinstance(head, ModelHead)
    ids, targets = torch.arange(20, 30), torch.arange(40, 50)
    hidden = body(input_ids=ids[None]).last_hidden_state[0].detach().requires_grad_()
    expected = torch.nn.functional.cross_entropy(base(input_ids=ids[None]).logits[0], targets, reduction="none")
    assert torch.allclose(head.losses(hidden, targets), expected, rtol=1e-5)
    total = head.loss(hidden, targets)
    (2 * total).backward()
    assert total.item() == pytest.approx(expected.sum().item(), rel=1e-5)
    leaf = hidden.detach().requires_grad_()
    (2 * torch.nn.functional.cross_entropy(head.logits(leaf), targets, reduction="sum")).backward()
    assert relative(hidden.grad, leaf.grad) < 1e-6
    assert base.get_submodule(head.name) is body  # the stand-in is gone


@pytest.mark.parametrize("positions", [6, 24])
def test_a_short_table_of_positions(positions):
    base, rows, start = (
        freeze(small_base("gpt2", n_positions=positions), FP32),
        random_examples(3, 4),
        torch.randn(2, 32),
    )
    engine = packed_engine(base, FP32)
    assert engine.activation_bytes(2, rows) > 0
    _, gradient = gradient_of(engine, start, rows)
    assert relative(gradient, naive_gradient(base, start, rows)[1]) < 1e-5


@pytest.mark.parametrize("kind", ["mpt", "gpt_neo"])
def test_a_base_without_the_attention_interface_is_refused(kind):
    with pytest.raises(ModelError, match="without transformers' attention interface"):
        packed_engine(small_base(kind), FP32, 100)


def test_tolerances_are_named_for_every_compute_dtype():
    assert LOSS_TOLERANCE.keys() == GRADIENT_TOLERANCE.keys() == {torch.float64, FP32, BF16, torch.float16}
