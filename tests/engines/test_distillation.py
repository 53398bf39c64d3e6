"""Distillation: the divergence from a teacher and its gradient, against log-probabilities written out for each row."""

import math

import pytest
import torch
from helpers.bases import make_bloom
from helpers.memory import PeakMemory
from helpers.packed_cases import relative
from helpers.small_bases import WINDOW, small_base
from torch import Tensor

from softprompt.data.examples import Example, Examples, IndexedExamples
from softprompt.engines import linear_cross_entropy as fused
from softprompt.engines.bloom_schedule import MicrobatchMajor
from softprompt.engines.distillation import distilling, evaluate_student, record_teacher, with_head
from softprompt.engines.factory import packed_engine, padded_engine
from softprompt.engines.head import ModelHead
from softprompt.engines.microbatch_engine import MicrobatchEngine
from softprompt.models.bloom_weights import resident_weights
from softprompt.models.loading import freeze
from softprompt.prompt.soft_prompt import PromptEmbedding

FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16
KINDS = ("bloom", "llama", "gemma2", "gemma3_text", "granite")  # gemma2 and granite have no plain linear head


def base_of(kind, dtype=FP32):
    return freeze(make_bloom() if kind == "bloom" else small_base(kind), dtype)


def engine_of(kind, base, padded=False, tokens=25, dtype=FP32):
    if padded:
        return padded_engine(base, type("Tokenizer", (), {"pad_token_id": 3}), dtype, tokens)
    if kind == "bloom":
        return MicrobatchEngine(MicrobatchMajor(resident_weights(base, dtype)), tokens)
    return packed_engine(base, dtype, tokens)


def pairs(n, seed=0):
    """Rows of a teacher and of its student: other questions of other lengths, and the same answers."""
    draw = torch.Generator().manual_seed(seed)
    teacher, student = [], []
    for _ in range(n):
        counts = torch.randint(1, 2 * WINDOW, (3,), generator=draw).tolist()
        asked, other, answer = (torch.randint(4, 290, (count,), generator=draw).tolist() for count in counts)
        teacher.append(Example(asked + answer, [-100] * len(asked) + answer))
        student.append(Example(other + answer, [-100] * len(other) + answer))
    return [IndexedExamples(Examples.from_rows(rows)) for rows in (teacher, student)]


def log_probabilities(base, prompt: Tensor, row: Example) -> Tensor:
    """Those at the targets of a row that is run alone: [n, V]."""
    words = base.get_input_embeddings()(torch.tensor(row.input_ids))
    logits = base(inputs_embeds=torch.cat([prompt, words])[None]).logits[0].double()
    at = [len(prompt) + i - 1 for i, label in enumerate(row.labels) if label != -100]
    return logits[at].log_softmax(-1)


def naive(base, teacher_prompt, student_prompt, teacher_rows, student_rows):
    """The divergence [rows], and the number of disagreements of each row."""
    divergences, others = [], []
    for theirs, ours in zip(teacher_rows, student_rows, strict=True):
        with torch.no_grad():
            expected = log_probabilities(base, teacher_prompt, theirs)
        found = log_probabilities(base, student_prompt, ours)
        divergences.append((expected.exp() * (expected - found)).sum())
        others.append(int((expected.argmax(-1) != found.argmax(-1)).sum()))
    return torch.stack(divergences), others


def distilled(engine, teacher_prompt, start, teacher_rows, student_rows):
    """The divergence of each row, their sum, its gradient, and the disagreements."""
    table = record_teacher(engine, engine, teacher_prompt, teacher_rows)
    student, prompt = distilling(engine, table), PromptEmbedding(start)
    total, _ = student.accumulate(prompt, student_rows, 1.0)
    each, differ = evaluate_student(engine, table, start, student_rows)
    assert each == pytest.approx(student.row_losses(start, student_rows))
    return each, total.item(), prompt.weight.grad, differ


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("P", [1, 10, 100])
@pytest.mark.parametrize("padded", [False, True])
def test_divergence_and_gradient_are_those_of_rows_run_alone(kind, P, padded):
    base, (teacher_rows, student_rows) = base_of(kind), pairs(5, seed=P)
    H, draw = base.get_input_embeddings().embedding_dim, torch.Generator().manual_seed(P)
    teacher_prompt, start = torch.randn(17, H, generator=draw), torch.randn(P, H, generator=draw)
    leaf = start.clone().requires_grad_()
    expected, others = naive(base, teacher_prompt, leaf, teacher_rows, student_rows)
    expected.sum().backward()
    engine = engine_of(kind, base, padded)
    each, total, gradient, differ = distilled(engine, teacher_prompt, start, teacher_rows, student_rows)
    assert each == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-4)
    assert total == pytest.approx(expected.sum().item(), rel=1e-4)
    assert relative(gradient, leaf.grad) < 1e-4
    assert differ == others and sum(others) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_itself_diverges_from_nothing(kind):
    """One row; the student is given the teacher's own text."""
    base, (teacher_rows, _) = base_of(kind), pairs(1)
    prompt = base.get_input_embeddings()(torch.arange(20, 32))
    each, _, gradient, differ = distilled(engine_of(kind, base), prompt, prompt, teacher_rows, teacher_rows)
    assert each[0] == pytest.approx(0, abs=1e-4) and gradient.abs().max() < 1e-4 and differ == [0]


def test_predictions_are_recorded_for_the_head_of_the_student():
    """Teacher and student may compute logits in two ways: with a fused head, and with the base's code."""
    base, (teacher_rows, student_rows) = base_of("llama"), pairs(3)
    prompt, engine = torch.randn(5, base.config.hidden_size), engine_of("llama", base)
    general = with_head(engine, ModelHead(base, base, "model", FP32))
    table = record_teacher(engine, general, prompt, teacher_rows)
    expected, _ = naive(base, prompt, prompt, teacher_rows, student_rows)
    assert distilling(general, table).row_losses(prompt, student_rows) == pytest.approx(expected.tolist(), rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "bloom"])
def test_bf16_is_near_fp32(kind):
    base, (teacher_rows, student_rows) = base_of(kind), pairs(6, seed=3)
    H = base.get_input_embeddings().embedding_dim
    teacher_prompt, start = torch.randn(17, H), torch.randn(5, H)
    args = teacher_prompt, start, teacher_rows, student_rows
    each, _, gradient, _ = distilled(engine_of(kind, base), *args)
    half = base_of(kind, BF16)
    close, _, same, _ = distilled(engine_of(kind, half, dtype=BF16), *args)
    assert close == pytest.approx(each, rel=0.2, abs=0.1) and relative(same, gradient) < 0.15


def test_labels_are_the_numbers_of_targets():
    rows = [Example([7, 8, 9], [-100, 8, 9]), Example([5, 6], [-100, -100]), Example([4, 3], [-100, 3])]
    indexed = IndexedExamples(Examples.from_rows(rows))
    assert [row.labels for row in indexed] == [[-100, 0, 1], [-100, -100], [-100, 2]]
    assert indexed[1:] == list(indexed)[1:] and indexed[-1] == indexed[2]
    assert [row.input_ids for row in indexed] == [row.input_ids for row in rows] and indexed.targets == 3


@pytest.mark.parametrize("n, words, elements", [(1, 2, 1), (7, 60, 50), (13, 61, 10**6), (0, 5, 50)])
@pytest.mark.parametrize("dtype", [FP64, FP32, BF16, torch.float16], ids=str)
def test_the_fused_divergence(n, words, elements, dtype, monkeypatch):
    """Against the same numbers in fp64."""
    monkeypatch.setitem(fused.BLOCK_ELEMENTS, "cpu", elements)
    draw = torch.Generator().manual_seed(n)
    head = torch.randn(words, 8, generator=draw).to(dtype)
    theirs, ours = (torch.randn(n, 8, generator=draw).to(dtype) for _ in range(2))
    logs, x = (theirs.double() @ head.double().T).log_softmax(-1), ours.double().clone().requires_grad_()
    expected = (logs.exp() * (logs - (x @ head.double().T).log_softmax(-1))).sum(-1)
    (0.7 * expected.sum()).backward()
    teacher = fused.projected_teacher(theirs, head)
    exact = {FP64: 1e-10, FP32: 1e-5, BF16: 2e-2, torch.float16: 5e-3}[dtype]
    assert teacher.top.tolist() == logs.argmax(-1).tolist()
    entropies = -(logs.exp() * logs).sum(-1)
    assert teacher.entropies.tolist() == pytest.approx(entropies.tolist(), abs=max(1e-5, exact / 100))
    y = ours.clone().requires_grad_()
    value = fused.projected_divergence(y, head, teacher.mean_rows, teacher.entropies)
    (0.7 * value).backward()
    assert value.item() == pytest.approx(expected.sum().item(), rel=exact, abs=exact)
    assert n == 0 or relative(y.grad.double(), x.grad) < exact
    each, top = fused.projected_divergences(ours, head, teacher.mean_rows, teacher.entropies)
    assert top.tolist() == (ours.double() @ head.double().T).argmax(-1).tolist()
    # Unlike in training, no product here is in a narrow dtype.
    assert each.tolist() == pytest.approx(expected.tolist(), rel=min(exact, 1e-5), abs=min(exact, 1e-5))


def test_the_logits_of_all_positions_are_never_in_memory(monkeypatch):
    n, words, H = 300, 2000, 16
    monkeypatch.setitem(fused.BLOCK_ELEMENTS, "cpu", 20_000)
    head, theirs = torch.randn(words, H), torch.randn(n, H)
    ours = torch.randn(n, H, requires_grad=True)
    with PeakMemory() as memory:
        teacher = fused.projected_teacher(theirs, head)
        fused.projected_divergence(ours, head, teacher.mean_rows, teacher.entropies).backward()
        fused.projected_divergences(ours.detach(), head, teacher.mean_rows, teacher.entropies)
    assert 4 * 20_000 < memory.peak < 4 * n * words / 4


@pytest.mark.parametrize("kind", ["gemma2", "granite"])
def test_a_head_of_the_base_is_evaluated_in_fp32(kind):
    """In bf16 many logits are equal, and ties would be broken by token id."""
    narrow, base = (freeze(small_base(kind, tie_word_embeddings=True), dtype) for dtype in (BF16, FP32))
    head, wide = packed_engine(narrow, BF16).schedule.head, packed_engine(base, FP32).schedule.head
    draw = torch.Generator().manual_seed(0)
    theirs, ours = (torch.randn(200, base.config.hidden_size, generator=draw) for _ in range(2))
    teacher, exact = head.teacher(theirs), wide.teacher(theirs)
    assert torch.equal(teacher.top, exact.top) and torch.allclose(teacher.entropies, exact.entropies, rtol=1e-4)
    for found, expected in zip(head.divergences(ours, teacher), wide.divergences(ours, exact), strict=True):
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_a_layer_before_the_output_layer_is_evaluated_in_its_own_dtype():
    hidden, entropies = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)), []
    for dtype in (BF16, FP32):
        base = freeze(small_base("modernbert-decoder", tie_word_embeddings=True), dtype)
        entropies.append(packed_engine(base, dtype).schedule.head.teacher(hidden).entropies)
    assert torch.allclose(*entropies, rtol=0.05)


def test_a_student_that_is_near_its_teacher_keeps_its_gradient():
    """The gradient is a small difference of two means of rows that have much in common."""
    draw = torch.Generator().manual_seed(0)
    head = 3 + torch.randn(500, 16, generator=draw)
    theirs = torch.randn(5, 16, generator=draw)
    x = (theirs + 1e-3 * torch.randn(5, 16, generator=draw)).requires_grad_()
    y = x.detach().double().requires_grad_()
    logs = (theirs.double() @ head.double().T).log_softmax(-1)
    (logs.exp() * (logs - (y @ head.double().T).log_softmax(-1))).sum().backward()
    teacher = fused.projected_teacher(theirs, head)
    fused.projected_divergence(x, head, teacher.mean_rows, teacher.entropies).backward()
    assert relative(x.grad.double(), y.grad) < 1e-2 and math.isfinite(x.grad.norm())
