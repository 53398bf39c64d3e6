"""The engine of inference: packed where its losses pass the check, else padded."""

import pytest
import torch
from helpers.bases import make_bloom
from helpers.peers import random_examples
from helpers.small_bases import WINDOW, small_base

from softprompt.engines import self_check
from softprompt.engines.checked_engine import CheckedEngine
from softprompt.engines.factory import engine_for_inference, padded_engine
from softprompt.engines.self_check import CHECKED_ROWS
from softprompt.models.loading import freeze
from softprompt.utils.errors import ConfigError

FP32 = torch.float32
ROWS = random_examples(CHECKED_ROWS + 3, 3 * WINDOW, seed=4)
FEW = random_examples(CHECKED_ROWS, 3 * WINDOW, seed=5)
PROMPT = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def no_earlier_results(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def engine_of(kind, tokenizer, name="auto"):
    return engine_for_inference(name, freeze(small_base(kind), FP32), tokenizer, FP32)


def calls_of(engine, monkeypatch):
    """Record the numbers of rows whose losses the packed engine computes."""
    calls, row_losses = [], engine.packed.row_losses
    monkeypatch.setattr(
        engine.packed, "row_losses", lambda p, rows, *more: calls.append(len(rows)) or row_losses(p, rows)
    )
    return calls


@pytest.mark.parametrize("prompt", [PROMPT, None], ids=["prompt", "base"])
def test_losses_are_the_packed_engines_after_the_check(prompt, tokenizer, monkeypatch):
    engine = engine_of("gemma2", tokenizer)
    calls, expected = calls_of(engine, monkeypatch), engine.padded.row_losses(prompt, ROWS)
    assert engine.row_losses(prompt, ROWS) == pytest.approx(expected, rel=1e-4)
    assert calls == [CHECKED_ROWS, len(ROWS)]
    total, targets = engine.evaluate(prompt, ROWS)
    assert total.item() == pytest.approx(sum(expected), rel=1e-4) and targets > len(ROWS)


def test_few_rows_that_no_check_covers_take_the_padded_engine(tokenizer, monkeypatch):
    engine = engine_of("llama", tokenizer)
    calls = calls_of(engine, monkeypatch)
    assert engine.row_losses(PROMPT, FEW) == engine.padded.row_losses(PROMPT, FEW) and not calls
    engine.row_losses(PROMPT, ROWS)
    engine.row_losses(PROMPT, FEW[:1])
    assert calls[-1] == 1


def test_a_check_that_passed_holds_for_the_next_process_but_not_for_longer_rows(tokenizer, monkeypatch):
    engine_of("llama", tokenizer).row_losses(PROMPT, ROWS)
    engine = engine_of("llama", tokenizer)
    calls = calls_of(engine, monkeypatch)
    engine.row_losses(PROMPT, FEW[:1])
    assert calls == [1]
    longest = max(len(row.input_ids) for row in ROWS)
    longer = next(row for row in random_examples(40, 8 * WINDOW, seed=6) if len(row.input_ids) > longest)
    engine.row_losses(PROMPT, [*ROWS, longer])
    assert calls == [1, CHECKED_ROWS, len(ROWS) + 1]


@pytest.mark.parametrize("kind", ["llama4_text", "stablelm", "jamba"])
def test_what_the_packed_engine_computes_wrongly_is_padded_or_refused(kind, tokenizer):
    engine, base = engine_of(kind, tokenizer), freeze(small_base(kind), FP32)
    expected = padded_engine(base, tokenizer, FP32, 10_000).row_losses(PROMPT, ROWS)
    assert engine.row_losses(PROMPT, ROWS) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ConfigError, match="--engine packed: "):
        engine_of(kind, tokenizer, "packed").row_losses(PROMPT, FEW)


def test_an_error_of_memory_is_not_taken_for_a_failed_check(tokenizer, monkeypatch):
    engine = engine_of("llama", tokenizer)

    def fails(prompt, rows, *more):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(engine.packed, "row_losses", fails)
    with pytest.raises(torch.OutOfMemoryError):
        engine.row_losses(PROMPT, ROWS)


def test_bloom_and_engine_padded_are_not_checked(tokenizer, monkeypatch):
    monkeypatch.setattr(self_check, "compare_losses", None)
    assert not isinstance(engine_of("llama", tokenizer, "padded"), CheckedEngine)
    assert not isinstance(engine_for_inference("auto", freeze(make_bloom(), FP32), tokenizer, FP32), CheckedEngine)
