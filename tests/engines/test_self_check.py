"""The packed engine proves itself on the run's rows, and what fails the check is not taken."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.bases import make_bloom
from helpers.kernels import naive_varlen
from helpers.peers import naive_loss, random_examples
from helpers.small_bases import WINDOW, small_base
from torch.nn.attention import varlen

from softprompt.config.loader import train_config
from softprompt.data.examples import Examples
from softprompt.data.tokenization import Example, count_targets
from softprompt.engines import choice, self_check, varlen_attention
from softprompt.engines.choice import choose_engine
from softprompt.engines.decoder_attention import ATTENTION
from softprompt.engines.decoder_schedule import DecoderSchedule
from softprompt.engines.factory import packed_engine, padded_engine
from softprompt.engines.microbatch_engine import MicrobatchEngine
from softprompt.engines.self_check import (
    CHECKED_ROWS,
    CheckResult,
    compare,
    measure_speed,
    rows_to_check,
)
from softprompt.models.loading import freeze
from softprompt.prompt.soft_prompt import PromptEmbedding
from softprompt.training.resume_settings import merge_settings
from softprompt.utils.errors import ConfigError, TrainingError

FP32 = torch.float32
ROWS = random_examples(5, 3 * WINDOW, seed=4)


@pytest.fixture(autouse=True)
def no_earlier_results(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def choose(base, tokenizer, rows=ROWS, P=5, longest=0, **given):
    config = train_config(model_name_or_path="x", dataset="x", **given)
    prompt = torch.randn(P, base.config.hidden_size, generator=torch.Generator().manual_seed(0))
    return choose_engine(config, freeze(base, FP32), tokenizer, FP32, prompt, rows, longest)


def kind_of(chosen):
    return chosen.engine.schedule.kind


def at_speed(monkeypatch, speed):
    """As if the packed engine was so many times as fast."""
    calls = []
    monkeypatch.setattr(choice, "measure_speed", lambda *args: calls.append(args) or speed)
    return calls


@pytest.mark.parametrize(
    "base", [make_bloom(), small_base("llama"), small_base("gemma2")], ids=["bloom", "llama", "gemma2"]
)
def test_the_faster_right_engine_is_taken(base, tokenizer, monkeypatch):
    at_speed(monkeypatch, 2.5)
    chosen = choose(base, tokenizer)
    assert kind_of(chosen) == "packed" and "4 rows" in chosen.how and "2.5 times as fast" in chosen.how
    assert kind_of(choose(base, tokenizer, engine="padded")) == "padded"


def test_an_engine_that_is_clearly_slower_is_not_taken_unless_it_is_named(tokenizer, monkeypatch):
    at_speed(monkeypatch, 0.5)
    chosen = choose(small_base("llama"), tokenizer)
    assert kind_of(chosen) == "padded" and "2.0 times as long" in chosen.how
    assert kind_of(choose(small_base("llama"), tokenizer, engine="packed")) == "packed"


@pytest.mark.parametrize("kind", ["llama4_text", "stablelm", "mpt", "jamba"])
def test_what_the_packed_engine_computes_wrongly_or_not_at_all_is_caught(kind, tokenizer):
    chosen = choose(small_base(kind), tokenizer)
    assert kind_of(chosen) == "padded" and chosen.how
    with pytest.raises(ConfigError, match="--engine packed: "):
        choose(small_base(kind), tokenizer, engine="packed")


@pytest.mark.parametrize("kind", ["llama4_text", "jamba"])
def test_without_the_check_the_gradient_would_be_wrong(kind):
    base, start = freeze(small_base(kind), FP32), torch.randn(5, 32)
    values = start.clone().requires_grad_()
    naive_loss(base, values, ROWS).backward()
    prompt = PromptEmbedding(start)
    packed_engine(base, FP32, 10_000).accumulate(prompt, ROWS, 1 / sum(map(count_targets, ROWS)))
    assert (prompt.weight.grad - values.grad).norm() > 0.01 * values.grad.norm()


def test_chunked_attention_is_right_for_short_rows_and_checked_again_for_longer_ones(tokenizer, monkeypatch):
    """The result of a run with short rows does not hold for one with long rows."""
    at_speed(monkeypatch, 2.0)
    base, short = small_base("llama4_text"), random_examples(5, 4, seed=1)
    assert kind_of(choose(base, tokenizer, short, P=1)) == "packed"
    assert kind_of(choose(base, tokenizer, ROWS, P=1)) == "padded"


def test_rows_that_are_held_out_or_streamed_later_are_checked_by_a_row_of_their_length(tokenizer, monkeypatch):
    at_speed(monkeypatch, 2.0)
    base, short = small_base("qwen2_moe"), random_examples(5, 9, seed=1)
    assert kind_of(choose(base, tokenizer, short, longest=20)) == "packed"
    assert kind_of(choose(base, tokenizer, short, longest=60)) == "padded"
    assert kind_of(choose(base, tokenizer, short, longest=20)) == "packed"  # what failed says nothing of shorter rows


def test_a_result_is_kept_and_used_again(tokenizer, monkeypatch):
    calls = at_speed(monkeypatch, 3.0)
    first, again = (choose(small_base("llama"), tokenizer) for _ in range(2))
    assert first.how == again.how and len(calls) == 1
    choose(small_base("llama"), tokenizer, P=6)
    assert len(calls) == 2


def test_a_dry_run_keeps_no_checked(tokenizer, monkeypatch, tmp_path):
    at_speed(monkeypatch, 3.0)
    choose(small_base("llama"), tokenizer, dry_run=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content",
    [
        *("", "{}", "[]", "[" * 100_000, '{"rows": 1}', '{"rows": "a", "longest": "b"}', "null"),
        '{"rows": 4, "longest": 1000, "loss_error": "x", "gradient_error": 0.0}',
    ],
    ids=range(8),
)
def test_a_broken_result_is_found_anew(content, tokenizer, monkeypatch, tmp_path):
    calls = at_speed(monkeypatch, 3.0)
    choose(small_base("llama"), tokenizer)
    (kept,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    kept.write_text(content)
    assert kind_of(choose(small_base("llama"), tokenizer)) == "packed" and len(calls) == 2


def test_all_ranks_follow_rank_0(tokenizer, monkeypatch):
    at_speed(monkeypatch, 3.0)
    base = freeze(small_base("llama"), FP32)
    config = train_config(model_name_or_path="x", dataset="x")
    slow = list(CheckResult(4, 99, 0.0, 0.0, speed=0.1))
    chosen = choose_engine(config, base, tokenizer, FP32, torch.randn(3, 32), ROWS, agree=lambda mine: slow)
    assert kind_of(chosen) == "padded"


def test_the_longest_and_the_shortest_row_are_checked():
    rows = Examples.from_rows([Example([5] * n, [-100] * (n - 1) + [5]) for n in (3, 9, 4, 7, 2, 12, 5)])
    lengths = [len(row.input_ids) for row in rows_to_check(rows)]
    assert len(lengths) == CHECKED_ROWS and lengths[0] == 12 and lengths[-1] == 2
    assert rows_to_check([Example([5, 6], [-100, -100])]) == []
    assert len(rows_to_check(ROWS[:1])) == 1


@pytest.mark.parametrize("spoiled", ["loss", "gradient", "nan"])
def test_what_differs_is_no_proof(spoiled, tokenizer):
    base = freeze(small_base("llama"), FP32)
    padded, packed = padded_engine(base, tokenizer, FP32, 100), packed_engine(base, FP32, 100)
    assert compare(packed, padded, torch.randn(3, 32), ROWS).is_right(FP32)
    loss = packed.schedule.head.loss

    class Spoiled:
        losses = packed.schedule.head.losses

        def loss(self, hidden, targets):
            factor = {"gradient": 1.01, "nan": float("nan"), "loss": 1.0}[spoiled]
            return factor * loss(hidden, targets)

    packed.schedule.head = Spoiled()
    if spoiled == "loss":
        packed.schedule.head.losses = lambda hidden, targets: padded.schedule.head.losses(hidden, targets) + 0.01
    assert not compare(packed, padded, torch.randn(3, 32), ROWS).is_right(FP32)


def test_a_base_whose_gradient_depends_on_rounding_gets_a_larger_tolerance():
    assert not CheckResult(4, 9, 0.0, 2e-3, noise=1e-6).is_right(FP32)
    assert CheckResult(4, 9, 0.0, 2e-3, noise=1.2e-3).is_right(FP32)
    assert not CheckResult(4, 9, 0.0, float("inf"), noise=1.2e-3).is_right(FP32)


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [0.0, 0.5])
def test_no_noise_explains_half_a_gradient_or_none(factor, dtype, tokenizer, monkeypatch):
    base = freeze(small_base("llama"), dtype)
    padded, packed = padded_engine(base, tokenizer, dtype, 100), packed_engine(base, dtype, 100)
    prompt = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(self_check, "_rounded", lambda prompt, dtype: -prompt)
    assert compare(packed, padded, prompt, ROWS).is_right(dtype)
    loss = packed.schedule.head.loss
    monkeypatch.setattr(packed.schedule.head, "loss", lambda hidden, targets: factor * loss(hidden, targets))
    result = compare(packed, padded, prompt, ROWS)
    assert result.noise > 0.5 and not result.is_right(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, FP32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("of_prompt", [FP32, torch.float64], ids=str)
def test_errors_of_the_size_of_rounding(dtype, of_prompt):
    """Most numbers change, in both directions, and none by much more than the machine epsilon."""
    prompt = torch.randn(40, 32, generator=torch.Generator().manual_seed(1), dtype=of_prompt)
    change = self_check._rounded(prompt, dtype) / prompt - 1
    epsilon = max(torch.finfo(dtype).eps, torch.finfo(of_prompt).eps)
    assert change.abs().max() <= 1.6 * epsilon and (change != 0).float().mean() > 0.4
    assert change.mean().abs() < 0.1 * epsilon


@pytest.mark.parametrize("seed", range(3))
def test_a_base_whose_gradient_depends_on_rounding_passes_in_bf16(seed, tokenizer):
    """With steep attention, rounding to bf16 changes the gradient by a third, and each engine rounds in its own way."""
    base, bf16 = steep_base(3), torch.bfloat16
    prompt = torch.randn(3, 32, generator=torch.Generator().manual_seed(seed))
    result = compare(packed_engine(base, bf16, 100), padded_engine(base, tokenizer, bf16, 100), prompt, ROWS)
    assert result.gradient_error > 0.1 and result.is_right(bf16)


def steep_base(factor: float) -> Any:
    """A Llama in bf16 with steep attention, whose gradient depends on rounding."""
    base = small_base("llama")
    for name, weight in base.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            weight.data *= factor
    return freeze(base, torch.bfloat16)


@pytest.mark.parametrize("wrong_in", [(), (torch.bfloat16,), (FP32,)], ids=["right", "wrong in bf16", "wrong in fp32"])
@pytest.mark.parametrize("factor", [0.5, 0.0, -1.0, 100.0])
def test_a_gradient_that_rounding_changes_completely_is_compared_in_fp32(factor, wrong_in, tokenizer, monkeypatch):
    """And in bf16 at the embeddings of a text. Rounding changes the gradient at the prompt by a third here."""
    at_speed(monkeypatch, 2.0)
    monkeypatch.setattr(self_check, "NOISE_FACTOR", 0.0)
    monkeypatch.setitem(self_check.GRADIENT_TOLERANCE, torch.bfloat16, 0.2)
    base = steep_base(5)
    weights = {name: weight.data_ptr() for name, weight in base.named_parameters()}
    accumulate = DecoderSchedule.accumulate

    def changed(self, prompt, batches, scale):
        return accumulate(self, prompt, batches, scale * (factor if self.compute_dtype in wrong_in else 1.0))

    monkeypatch.setattr(DecoderSchedule, "accumulate", changed)
    prompt = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    config = train_config(model_name_or_path="x", dataset="x")
    chosen = choose_engine(config, base, tokenizer, torch.bfloat16, prompt, ROWS)
    assert kind_of(chosen) == ("padded" if wrong_in else "packed") and ("in fp32" in chosen.how) != bool(wrong_in)
    assert chosen.engine.compute_dtype is torch.bfloat16
    assert weights == {name: weight.data_ptr() for name, weight in base.named_parameters()}


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_losses_that_rounding_changes_are_compared_in_fp32(factor, tokenizer, monkeypatch):
    """In a mixture of experts, rounding may send a token to another expert."""
    at_speed(monkeypatch, 2.0)
    base = small_base("gpt_oss").requires_grad_(False)
    base.set_experts_implementation("eager")
    row_losses = MicrobatchEngine.row_losses

    def changed(self, *given):
        return [loss * (factor if self.schedule.kind == "packed" else 1) for loss in row_losses(self, *given)]

    monkeypatch.setattr(MicrobatchEngine, "row_losses", changed)
    prompt = torch.randn(10, 32, generator=torch.Generator().manual_seed(10))
    config, rows = train_config(model_name_or_path="x", dataset="x"), random_examples(9, 3 * WINDOW, seed=1)
    chosen = choose_engine(config, freeze(base, torch.bfloat16), tokenizer, torch.bfloat16, prompt, rows)
    assert (kind_of(chosen), "in fp32" in chosen.how) == (("packed", True) if factor == 1 else ("padded", False))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), RuntimeError("expected BFloat16")])
def test_a_base_that_cannot_run_in_fp32_takes_the_padded_engine(error, tokenizer, monkeypatch):
    at_speed(monkeypatch, 2.0)
    monkeypatch.setattr(self_check, "NOISE_FACTOR", 0.0)
    monkeypatch.setitem(self_check.GRADIENT_TOLERANCE, torch.bfloat16, 0.2)

    def failing(*_):
        raise error

    base = steep_base(5)
    monkeypatch.setattr(choice, "in_fp32", failing)
    prompt = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    config = train_config(model_name_or_path="x", dataset="x")
    assert kind_of(choose_engine(config, base, tokenizer, torch.bfloat16, prompt, ROWS)) == "padded"


def test_small_gradients_are_compared_like_large_ones():
    gradient = torch.randn(3, 4) * 1e-24
    assert self_check._relative(gradient, gradient) == 0
    assert self_check._relative(-gradient, gradient) == pytest.approx(2)


def kernels(kind, dtype, monkeypatch, device="cuda", **given):
    """The values of --attn_implementation that are tried for a base on a device."""
    config = train_config(model_name_or_path="x", dataset="x", **given)
    words = SimpleNamespace(weight=SimpleNamespace(device=torch.device(device)))
    monkeypatch.setattr(choice, "word_embeddings", lambda base: words)
    return choice.attn_implementations(config, make_bloom() if kind == "bloom" else small_base(kind), dtype)


@pytest.mark.parametrize(
    ("kind", "dtype", "device", "expected"),
    [
        ("llama", torch.bfloat16, "cuda", ["varlen", "sdpa"]),
        ("llama", torch.float16, "cuda:1", ["varlen", "sdpa"]),
        ("bloom", torch.bfloat16, "cuda", ["flex_attention", "sdpa"]),
        ("gemma2", torch.bfloat16, "cuda", ["flex_attention", "sdpa"]),
        ("llama", torch.float32, "cuda", ["sdpa"]),
        ("bloom", torch.bfloat16, "cpu", ["sdpa"]),
    ],
)
def test_kernels_that_are_tried(kind, dtype, device, expected, monkeypatch):
    assert kernels(kind, dtype, monkeypatch, device) == expected


def test_a_kernel_that_is_named_is_the_only_one(monkeypatch):
    assert kernels("llama", torch.bfloat16, monkeypatch, attn_implementation="sdpa") == ["sdpa"]
    with pytest.raises(ConfigError, match="--attn_implementation varlen needs CUDA"):
        kernels("llama", torch.bfloat16, monkeypatch, "cpu", attn_implementation="varlen")
    with pytest.raises(ConfigError, match="varlen does not support this BLOOM"):
        kernels("bloom", torch.bfloat16, monkeypatch, attn_implementation="varlen")
    monkeypatch.setattr(choice, "is_quantized", lambda base: True)
    assert kernels("bloom", torch.bfloat16, monkeypatch) == ["sdpa"]
    with pytest.raises(ConfigError, match="flex_attention does not support this BLOOM"):
        kernels("bloom", torch.bfloat16, monkeypatch, attn_implementation="flex_attention")


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_a_resumed_run_takes_the_checkpoints_kernel_where_it_works_and_says_where_not(kind, monkeypatch, capsys):
    name = "varlen" if kind == "llama" else "flex_attention"
    state = {"arguments": train_config("mini", attn_implementation=name).as_dict(), "engine": {}}
    base = make_bloom() if kind == "bloom" else small_base(kind)

    def tried(device, **given):
        config = train_config(resume_from_checkpoint="run", **given)
        words = SimpleNamespace(weight=SimpleNamespace(device=torch.device(device)))
        monkeypatch.setattr(choice, "word_embeddings", lambda base: words)
        merged = merge_settings(config, Path("run/checkpoint-2"), state)
        capsys.readouterr()
        return choice.attn_implementations(merged, base, torch.bfloat16)

    assert tried("cuda") == [name] and not capsys.readouterr().out
    assert tried("cpu") == ["sdpa"]
    (line,) = capsys.readouterr().out.splitlines()
    assert name in line and "cpu" in line and "sdpa" in line
    with pytest.raises(ConfigError, match=f"--attn_implementation {name} needs CUDA"):
        tried("cpu", attn_implementation=name)


@pytest.mark.parametrize(("speeds", "taken"), [((3.0, 2.0), "varlen"), ((2.0, 3.0), "sdpa")])
def test_the_fastest_kernel_is_taken(speeds, taken, tokenizer, monkeypatch):
    base, measured = freeze(small_base("llama"), FP32), iter(speeds)
    monkeypatch.setattr(varlen, "varlen_attn", naive_varlen)
    monkeypatch.setattr(varlen_attention, "is_half", lambda dtype: True)
    monkeypatch.setattr(choice, "attn_implementations", lambda *args: ["varlen", "sdpa"])
    monkeypatch.setattr(choice, "measure_speed", lambda *args: next(measured))
    engine, how = choose(base, tokenizer)
    assert engine.schedule.attn_implementation == taken and "3.0 times as fast" in how


def test_a_kernel_that_is_wrong_or_fails_is_not_taken(tokenizer, monkeypatch):
    base = freeze(small_base("llama"), FP32)
    monkeypatch.setattr(choice, "attn_implementations", lambda *args: ["varlen", "flex_attention", "sdpa"])
    monkeypatch.setattr(varlen_attention, "is_half", lambda dtype: True)
    monkeypatch.setattr(varlen, "varlen_attn", lambda q, *args, **others: q)  # FlexAttention has no backward here
    engine, how = choose(base, tokenizer, engine="packed")
    assert engine.schedule.attn_implementation == "sdpa" and how.startswith("packed engine")


def forget_memory(monkeypatch, base, most):
    """Let the base have no memory for more than so many positions at once: `most` by the engine's kind."""

    def refuse(module, inputs):
        kind = "packed" if base.config._attn_implementation == ATTENTION else "padded"
        if inputs[0].shape[0] * inputs[0].shape[1] > most.get(kind, 10_000):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory (as a test has it)")

    base.model.layers[1].register_forward_pre_hook(refuse)


@pytest.mark.parametrize("engine", ["auto", "packed"])
def test_rows_for_which_the_padded_engine_has_no_memory_are_left_out_of_the_check(engine, tokenizer, monkeypatch):
    """The packed engine has the memory, so the run goes on; the line says what is unchecked."""
    timed, base = at_speed(monkeypatch, 0.1), small_base("llama")
    lengths = sorted((len(row.input_ids) for row in rows_to_check(ROWS)), reverse=True)
    forget_memory(monkeypatch, base, {"padded": 5 + lengths[1]})
    bare, losses = [], choice.compare_losses
    monkeypatch.setattr(choice, "compare_losses", lambda *args: bare.extend(args[3]) or losses(*args))
    chosen = choose(base, tokenizer, engine=engine, tokens_per_microbatch=1000)
    assert kind_of(chosen) == "packed" and not timed
    assert [len(row.input_ids) for row in bare] == lengths[1:]  # also without a prompt
    assert f"on {CHECKED_ROWS - 1} rows" in chosen.how and f"more than {lengths[1]} tokens are unchecked" in chosen.how


def test_of_rows_that_are_equally_long_the_second_half_is_checked(tokenizer, monkeypatch):
    """As with rows that are all cut at --max_length."""
    rows = [Example([*row.input_ids[:1] * 12, 5, 6], [-100] * 12 + [5, 6]) for row in ROWS[:3]]
    base = small_base("llama")
    forget_memory(monkeypatch, base, {"padded": 5 + 9})
    chosen = choose(base, tokenizer, rows, tokens_per_microbatch=1000)
    assert kind_of(chosen) == "packed" and "of more than 7 tokens are unchecked" in chosen.how


def test_a_packed_engine_that_has_no_memory_is_not_taken(tokenizer, monkeypatch):
    base = small_base("llama")
    forget_memory(monkeypatch, base, {"packed": 8})
    chosen = choose(base, tokenizer, tokens_per_microbatch=1000)
    assert kind_of(chosen) == "padded" and "out of memory" in chosen.how


@pytest.mark.parametrize("most", [{"packed": 8, "padded": 8}, {"packed": 8, "padded": 20}])
def test_without_memory_for_the_longest_row_in_either_engine_the_run_ends(most, tokenizer, monkeypatch):
    base = small_base("llama")
    forget_memory(monkeypatch, base, most)
    with pytest.raises(TrainingError, match="out of memory with one row"):
        choose(base, tokenizer, tokens_per_microbatch=1000)


class TimedEngine:
    """An engine whose gradient takes `seconds`, and `busy` seconds longer in two of three calls."""

    device, first = torch.device("cpu"), 0.0

    def __init__(self, seconds, busy=0.0):
        self.calls, self.seconds, self.busy = 0, seconds, busy

    def accumulate(self, *args):
        self.calls += 1
        time.sleep(self.seconds + (self.busy if self.calls % 3 else 0) + (self.first if self.calls == 1 else 0))


def test_a_busy_machine_does_not_decide_which_engine_is_faster():
    packed, padded = TimedEngine(0.002, busy=0.02), TimedEngine(0.006)
    assert measure_speed(packed, padded, torch.zeros(1, 4), ROWS) > 1.5


@pytest.mark.parametrize(("affordable", "calls"), [(20.0, 2), (0.0, 1)])
def test_a_step_that_takes_long_is_measured_twice_on_a_few_rows_if_that_is_affordable(affordable, calls, monkeypatch):
    monkeypatch.setattr(self_check, "AFFORDABLE", affordable)
    packed, padded = TimedEngine(0.002), TimedEngine(0.006)
    packed.first = 0.05  # as if the first call allocated memory
    speed = measure_speed(packed, padded, torch.zeros(1, 4), ROWS * 200)
    assert packed.calls == padded.calls == calls and (speed > 1.5) == (calls == 2)
