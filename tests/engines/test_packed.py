"""The packed engine is the base's own forward: loss and gradient against naive references, whatever shapes and cuts."""

import copy
import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from helpers.bases import make_bloom, make_tokenizer
from helpers.packed_cases import BASES, BF16, FP32, FP64, ROWS, base_of, ours, prompt_like, relative
from helpers.peers import collated, naive_loss, peft_model, peft_prompt, random_examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from softprompt.data.collate import collate_packed, cut_by_tokens
from softprompt.data.tokenization import Example, count_targets
from softprompt.engines import bloom
from softprompt.engines import linear_cross_entropy as loss
from softprompt.engines import prefix_attention as attention
from softprompt.engines.bloom_schedule import MicrobatchMajor
from softprompt.engines.factory import padded_engine
from softprompt.engines.microbatch_engine import MicrobatchEngine
from softprompt.engines.prefix_attention import causal_alibi, group_rows
from softprompt.models.bloom_weights import ResidentWeights
from softprompt.models.loading import freeze
from softprompt.prompt.soft_prompt import PromptEmbedding
from softprompt.utils.errors import TrainingError


def packed(base, dtype=FP32, tokens=64, checkpointing=False):
    return MicrobatchEngine(MicrobatchMajor(ResidentWeights(base, dtype), checkpointing), tokens)


def test_a_rank_without_rows_needs_memory_too():
    """As many ranks as rows and one more: a dry run asks each of them."""
    base = freeze(make_bloom(), FP32)
    engines = packed(base), padded_engine(base, make_tokenizer(), FP32, 64)
    for engine in engines:
        assert 0 <= engine.activation_bytes(3, []) < engine.activation_bytes(3, random_examples(2, 9))


MANY = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def one_group_for_all(lengths, device):
    """As on a device where rows are padded to one group."""
    return [attention._group(list(lengths), device)] if lengths else []


@MANY
@given(BASES, ROWS, st.integers(1, 64), st.integers(1, 90), st.booleans(), st.booleans())
def test_loss_and_gradient_are_the_plain_forwards(base, rows, P, tokens, checkpointing, padded_groups):
    """Equal within 1e-5. A rare base is so ill-conditioned that transformers' own fp32 gradient is off by that much;
    there the packed engine's must be within 3e-5 of the gradient in double precision."""
    exact_base, base = copy.deepcopy(base), freeze(base, FP32)
    values = prompt_like(base, P).requires_grad_()
    expected = naive_loss(base, values, rows)
    expected.backward()
    with pytest.MonkeyPatch.context() as patch:
        if padded_groups:
            patch.setattr(bloom, "group_rows", one_group_for_all)
        mean, gradient = ours(packed(base, FP32, tokens, checkpointing), values.detach(), rows)
    assert mean == pytest.approx(expected.item(), rel=1e-5)
    if relative(gradient, values.grad) >= 1e-5:
        _, truth = exact_loss_and_gradient(exact_base, values.detach(), rows)
        assert relative(gradient.double(), truth) < 3e-5


def exact_gelu(self, x):
    return F.gelu(x, approximate="tanh")


def exact_alibi(attention_mask, num_heads, dtype):
    """transformers' build_alibi_tensor, in fp64 throughout: slope × position, [B·N, 1, T]."""
    below = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8 / below * i) for i in range(1, below + 1)]
    slopes += [2.0 ** (-8 / (2 * below) * i) for i in range(1, 2 * (num_heads - below) + 1, 2)][: num_heads - below]
    positions = (attention_mask.cumsum(-1) - 1) * attention_mask  # [B, T]
    alibi = torch.tensor(slopes, dtype=FP64)[None, :, None] * positions[:, None]  # [B, N, T]
    return alibi.reshape(-1, 1, attention_mask.shape[1]).to(dtype)


def exact_loss_and_gradient(base, values, rows):
    """Those of transformers' forward in fp64, without what it rounds whatever the dtype: two constants of its GELU at
    the ninth digit, and ALiBi and softmax in fp32."""
    base, values = base.double().requires_grad_(False), values.double().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.models.bloom.modeling_bloom.BloomGelu.forward", exact_gelu)
        patch.setattr("transformers.models.bloom.modeling_bloom.build_alibi_tensor", exact_alibi)
        patch.setattr(F, "softmax", lambda x, dim, dtype: torch.softmax(x, dim))
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)  # naive_loss's log-softmax
        expected = naive_loss(base, values, rows)
        expected.backward()
    return expected.item(), values.grad


@MANY
@given(BASES, ROWS, st.integers(1, 64), st.integers(1, 90))
def test_in_double_precision(base, rows, P, tokens):
    base = base.double().requires_grad_(False)
    values = prompt_like(base, P)
    expected, truth = exact_loss_and_gradient(base, values, rows)
    mean, gradient = ours(packed(base, FP64, tokens), values, rows)
    assert mean == pytest.approx(expected, rel=1e-10)
    assert relative(gradient, truth) < 1e-10


def autocast_peft(base, values, rows):
    """PEFT's gradient [P, H] under bf16 autocast, as Trainer's bf16 runs it."""
    model = peft_model(base, values)
    batch = collated(rows)
    with torch.autocast("cpu", BF16):
        targets = (batch.labels[:, 1:] != -100).sum()
        out = model(**batch._asdict(), num_items_in_batch=targets)
    out.loss.backward()
    return peft_prompt(model).grad


def bf16_errors(base, P, length, seed):
    """Relative errors of the bf16 gradients of a window, ours and that of PEFT under autocast, against fp32's."""
    rows, values = random_examples(12, length, seed=seed), prompt_like(base, P, seed)
    _, truth = ours(packed(freeze(copy.deepcopy(base), FP32)), values, rows)
    _, mine = ours(packed(freeze(copy.deepcopy(base), BF16), BF16), values, rows)
    return relative(mine, truth), relative(autocast_peft(base, values, rows), truth)


def bf16_ratio(case, windows=3):
    """A case is a base (every other one with weights so large that attention is hard), P and a row length; its error
    the root mean square over windows, since one window's is one draw of roundings, on either side."""
    heads, P = 1 + case % 8, (1, 3, 10, 50)[case // 2 % 4]
    deviation = 0.3 if case % 2 else (2 / (32 * heads)) ** 0.5
    base = base_of(heads, 32, n_layer=1 + case % 3, vocab_size=300, seed=case, initializer_range=deviation)
    pairs = [bf16_errors(base, P, 10 + 2 * case, case + 1000 * window) for window in range(windows)]
    return math.hypot(*(mine for mine, _ in pairs)) / math.hypot(*(theirs for _, theirs in pairs))


@pytest.mark.parametrize("cases", [range(8), pytest.param(range(8, 88), marks=pytest.mark.slow)], ids=["8", "80"])
def test_bf16_is_nearer_to_the_truth_than_autocast(cases):
    """Over bases, lengths and prompts: the error against the fp32 gradient is in the median no larger than that of
    transformers under autocast, and in no case above 1.5 times it."""
    ratios = sorted(map(bf16_ratio, cases))
    print(f"median {statistics.median(ratios):.2f}, largest {ratios[-1]:.2f}")
    assert statistics.median(ratios) <= 1, ratios
    assert ratios[-1] <= 1.5, ratios


@pytest.mark.parametrize("shift", [-1, 1])
@pytest.mark.parametrize("what", ["mask", "distance"])
def test_a_mask_that_is_off_by_one_position_is_noticed(what, shift, monkeypatch):
    def broken(n_heads, width, P, like):
        bias = causal_alibi(n_heads, width, P, like)
        if what == "distance":  # the prompt's keys one position too far, or too near
            slopes = torch.tensor(attention.alibi_slopes(n_heads))[:, None, None]
            return torch.cat([bias[..., :P] + shift * slopes, bias[..., P:]], -1)
        ahead = torch.arange(P + width) - torch.arange(P, P + width)[:, None] > shift
        return torch.where(torch.isinf(bias), torch.zeros_like(bias), bias).masked_fill(ahead, -math.inf)

    base, rows = freeze(make_bloom(), FP32), random_examples(5, 12)
    values = prompt_like(base, 4)
    expected = naive_loss(base, values, rows).item()
    assert ours(packed(base), values, rows)[0] == pytest.approx(expected, rel=1e-5)
    monkeypatch.setattr(bloom, "causal_alibi", broken)
    assert ours(packed(base), values, rows)[0] != pytest.approx(expected, rel=1e-4)


def test_held_out_rows_with_and_without_a_prompt():
    base, rows = freeze(make_bloom(), FP32), random_examples(9, 14)
    for values, front in ((prompt_like(base, 3), prompt_like(base, 3)), (None, torch.empty(0, 32))):
        total, count = packed(base, tokens=30).evaluate(values, rows)
        assert count == sum(map(count_targets, rows)) and not total.requires_grad
        assert total.item() / count == pytest.approx(naive_loss(base, front, rows).item(), rel=1e-5)


def test_without_a_prompt_nothing_predicts_a_first_token():
    base = freeze(make_bloom(), FP32)
    total, count = packed(base).evaluate(None, [Example([9, 8, 7], [9, 8, 7])])
    assert count == 2
    assert total.item() == packed(base).evaluate(None, [Example([9, 8, 7], [-100, 8, 7])])[0].item()


def test_rows_without_any_target_leave_a_gradient_of_zeros():
    base = freeze(make_bloom(), FP32)
    mean, gradient = ours(packed(base), prompt_like(base, 3), [Example([5, 6, 7], [-100] * 3)])
    assert mean == 0 and gradient.shape == (3, 32) and not gradient.any()


def test_gradients_add_up_over_windows():
    base, rows = freeze(make_bloom(), FP32), random_examples(8, 9)
    prompt = PromptEmbedding(prompt_like(base, 3))
    for part in (rows[:3], rows[3:]):
        packed(base).accumulate(prompt, part, 0.5)
    whole = PromptEmbedding(prompt_like(base, 3))
    packed(base).accumulate(whole, rows, 0.5)
    assert torch.allclose(prompt.weight.grad, whole.weight.grad, rtol=1e-5, atol=1e-6)


def test_checkpointing_changes_no_bit():
    base, rows = freeze(make_bloom(n_layer=4), FP32), random_examples(8, 20)
    values = prompt_like(base, 5)
    mean, gradient = ours(packed(base), values, rows)
    again, same = ours(packed(base, checkpointing=True), values, rows)
    assert mean == again and torch.equal(gradient, same)


class Scarce(ResidentWeights):
    """A device that runs out of memory when more than so many tokens are embedded at once."""

    def __init__(self, base, dtype, most):
        super().__init__(base, dtype)
        self.most, plenty = most, self.embed

        def embed(ids):
            if len(ids) > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory (as a test has it)")
            return plenty(ids)

        self.embed = embed


def test_out_of_memory_cuts_the_window_finer(capsys):
    base, rows = freeze(make_bloom(), FP32), random_examples(9, 12)
    values = prompt_like(base, 3)
    mean, gradient = ours(packed(base), values, rows)
    engine = MicrobatchEngine(MicrobatchMajor(Scarce(base, FP32, 25)), 100)
    again, same = ours(engine, values, rows)
    assert again == pytest.approx(mean, rel=1e-6) and relative(same, gradient) < 1e-5
    assert engine.state_dict() == {"engine": "packed", "tokens_per_microbatch": 25, "attn_implementation": "sdpa"}
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and "out of memory" in told[0] and "50 tokens" in told[0] and "25 tokens" in told[1]
    engine.schedule.weights.most = 0
    with pytest.raises(TrainingError, match=r"out of memory with one row of \d+ tokens .* a smaller --max_l"):
        engine.evaluate(values, rows)


def test_an_error_of_another_kind_is_not_repeated(monkeypatch):
    engine, calls = packed(freeze(make_bloom(), FP32)), []

    def fail(ids):
        calls.append(ids)
        raise RuntimeError("something else")

    engine.schedule.weights.embed = fail
    with pytest.raises(RuntimeError, match="something else"):
        engine.accumulate(PromptEmbedding(torch.ones(2, 32)), random_examples(3, 5), 1.0)
    assert len(calls) == 1


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 100))
def test_cuts_keep_to_the_budget(lengths, budget):
    rows = [Example([n] * n, [-100] * n) for n in lengths]
    parts = list(cut_by_tokens(rows, budget))
    assert sorted(len(r.input_ids) for part in parts for r in part) == sorted(lengths)
    assert all(len(part) == 1 or sum(len(r.input_ids) for r in part) <= budget for part in parts)


def test_a_packed_microbatch():
    rows = [Example([5, 6, 7, 4], [-100, 6, 7, -100]), Example([8, 9], [8, 9]), Example([4, 5], [-100, -100])]
    batch = collate_packed([*rows, Example([3, 2], [3, -100])])
    assert batch.input_ids.tolist() == [5, 6, 8] and batch.lengths == [2, 1]
    assert batch.predictors.tolist() == [0, 1, 2] and batch.targets.tolist() == [6, 7, 9]
    assert batch.first_targets.tolist() == [8, 3]


def test_equal_rows_are_not_padded():
    cpu = torch.device("cpu")
    assert [(g.rows, g.width, g.pad_index) for g in group_rows([7, 7, 5, 2, 2, 2], cpu)] == [
        (2, 7, None),
        (1, 5, None),
        (3, 2, None),
    ]
    near = group_rows([8, 7, 6, 5, 2], torch.device("meta"))
    assert [(g.rows, g.width) for g in near] == [(3, 8), (1, 5), (1, 2)]
    group = one_group_for_all([3, 1], cpu)[0]
    assert group.pad_index.tolist() == [0, 1, 2, 3, 3, 3] and group.unpad_index.tolist() == [0, 1, 2, 3]


def fused_and_plain(n, words, size, scale, dtype=FP64, elements=50):
    draw = torch.Generator().manual_seed(n)
    hidden = (scale * torch.randn(n, size, generator=draw, dtype=FP64)).to(dtype)
    head, targets = torch.randn(words, size, generator=draw, dtype=FP64), torch.randint(0, words, (n,), generator=draw)
    results = []
    for fused in (True, False):
        x = hidden.clone().to(dtype if fused else FP64).requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(loss.BLOCK_ELEMENTS, "cpu", elements)
            if fused:
                value = loss.projected_cross_entropy(x, head.to(dtype), targets)
            else:
                value = F.cross_entropy(x @ head.to(dtype).double().T, targets, reduction="sum")
        (value * 0.7).backward()
        results.append((value.item(), x.grad.double()))
    return results


@pytest.mark.parametrize("n, words, elements", [(1, 2, 1), (7, 60, 50), (7, 60, 7), (13, 61, 10**6), (64, 33, 1)])
def test_the_fused_cross_entropy(n, words, elements):
    (value, gradient), (expected, truth) = fused_and_plain(n, words, 8, 1.0, elements=elements)
    assert value == pytest.approx(expected, rel=1e-12)
    assert torch.allclose(gradient, truth, rtol=1e-10, atol=1e-12)


def test_no_targets_no_loss():
    x = torch.zeros(0, 8, requires_grad=True)
    value = loss.projected_cross_entropy(x, torch.ones(5, 8), torch.zeros(0, dtype=torch.int64))
    value.backward()
    assert value.item() == 0 and x.grad.shape == (0, 8)


def test_a_target_that_is_almost_certain_keeps_its_gradient():
    """Where p(target) rounds to 1, 1 - p is lost; the margin to the other words is not."""
    head = torch.eye(4)
    x = torch.tensor([[40.0, 0, 0, 0]], requires_grad=True)
    value = loss.projected_cross_entropy(x, head, torch.tensor([0]))
    value.backward()
    others = 3 * math.exp(-40)
    assert value.item() == pytest.approx(others, rel=1e-5)
    assert x.grad[0].tolist() == pytest.approx([-others, others / 3, others / 3, others / 3], rel=1e-5)


HEADS = {  # n rows, V words, size, what all rows of the head share, scale of the hidden states
    "plain": (33, 5_000, 64, 0, 1.0),
    "much in common": (33, 5_000, 64, 3, 0.05),
    "many words": (3, 100_000, 32, 4, 0.02),
    "flat": (3, 100_000, 32, 0, 0.001),
    "almost certain": (7, 5_000, 64, 0, 0.1),
    "a twin of the target": (9, 500, 64, 0, 0.1),
}


ERRORS = {torch.float16: 4e-3, BF16: 2e-2, FP32: 1e-3, FP64: 1e-9}  # of gradients; some are hard for the reference, too


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_the_fused_gradient_is_as_exact_as_its_dtype(name, dtype):
    """Against the same numbers in fp64. What is left is the rounding of logits and of the gradient itself."""
    (n, words, size, common, scale), draw = HEADS[name], torch.Generator().manual_seed(1)
    head = common + (0.05 if common else 0.3) * torch.randn(words, size, generator=draw)
    targets, hidden = torch.arange(n) * (words // n), scale * torch.randn(n, size, generator=draw)
    if name == "almost certain":
        hidden += 4 * head[targets]
    if name == "a twin of the target":
        head[targets + 1] = 1.01 * head[targets]
        hidden += 3 * head[targets]
    head, hidden = head.to(dtype), hidden.to(dtype)
    x, y = hidden.clone().requires_grad_(), hidden.double().clone().requires_grad_()
    value, expected = (
        loss.projected_cross_entropy(x, head, targets),
        F.cross_entropy(y @ head.double().T, targets, reduction="sum"),
    )
    (value * 2**12).backward()  # as a GradScaler does: fp16 has no smaller gradients
    (expected * 2**12).backward()
    assert value.item() == pytest.approx(expected.item(), rel=ERRORS[dtype])
    assert relative(x.grad.double(), y.grad) < ERRORS[dtype]
    each = loss.projected_losses(hidden, head, targets)
    assert each.sum().item() == pytest.approx(value.item(), rel=1e-5)


def test_in_fp16_the_sum_over_a_large_vocabulary_does_not_overflow():
    x = torch.zeros(1, 8, dtype=torch.float16, requires_grad=True)
    value = loss.projected_cross_entropy(x, torch.ones(100_000, 8, dtype=torch.float16), torch.tensor([7]))
    value.backward()
    assert value.item() == pytest.approx(math.log(100_000), rel=1e-6) and x.grad.abs().max() == 0


def test_the_token_budget_follows_the_memory():
    from softprompt.engines.memory_estimate import MAX_TOKENS, MIN_TOKENS, auto_tokens
    from softprompt.models.bloom_weights import BloomShape

    shape = BloomShape(24, 16, 128, 2048, 46145, 1e-5, False)
    cuda = torch.device("cuda")
    budgets = [auto_tokens(shape, BF16, 10, cuda, gib << 30) for gib in (4, 8, 16, 24, 80)]
    assert budgets == sorted(budgets) and budgets[0] == MIN_TOKENS and budgets[-1] == MAX_TOKENS["cuda"]
    assert (
        auto_tokens(shape, BF16, 200, cuda, 16 << 30) <= budgets[2] < auto_tokens(shape, BF16, 10, cuda, 16 << 30, True)
    )
    assert auto_tokens(shape, BF16, 200, cuda, 8 << 30) < budgets[1]
    assert auto_tokens(shape, FP32, 10, cuda, 8 << 30) < budgets[1]
    assert auto_tokens(shape, BF16, 10, cuda, 8 << 30, gradient_checkpointing=True) > budgets[1]
