"""What a training run's choice of the engine covers: the bare base, and why the packed engine is refused."""

import pytest
import torch
from helpers.peers import random_examples
from helpers.small_bases import WINDOW, small_base

from softprompt.config.loader import train_config
from softprompt.engines import choice
from softprompt.engines.choice import choose_engine
from softprompt.engines.decoder_schedule import DecoderSchedule
from softprompt.engines.factory import packed_engine, padded_engine
from softprompt.engines.self_check import compare
from softprompt.models.loading import freeze
from softprompt.utils.errors import ConfigError, ModelError

FP32, P = torch.float32, 5
ROWS = random_examples(5, 3 * WINDOW, seed=4)
PROMPT = torch.randn(P, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def no_earlier_results(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "measure_speed", lambda *args: 2.0)


def choose(base, tokenizer, **given):
    config = train_config(model_name_or_path="x", dataset="x", **given)
    return choose_engine(config, freeze(base, FP32), tokenizer, FP32, PROMPT, ROWS)


@pytest.mark.parametrize("fault", ["wrong", "fails"])
def test_an_engine_that_is_only_wrong_without_a_prompt_is_not_taken(fault, tokenizer, monkeypatch):
    """The run evaluates the bare base with it, too, on rows of as many positions as behind the prompt."""
    base, longest = small_base("llama"), max(len(row.input_ids) for row in ROWS)
    assert choose(base, tokenizer).engine.schedule.kind == "packed"
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    forward, seen = DecoderSchedule.rows_forward, []

    def spoiled(self, prefix, batch):
        if not len(prefix.layers[0]):
            seen.extend(batch.lengths)
            if fault == "fails":
                raise RuntimeError("no prompt")
            batch = batch._replace(input_ids=batch.input_ids.flip(0))
        return forward(self, prefix, batch)

    monkeypatch.setattr(DecoderSchedule, "rows_forward", spoiled)
    engine, how = choose(base, tokenizer)
    assert engine.schedule.kind == "padded" and how
    assert max(seen) == longest + P - 1  # the last token predicts none
    with pytest.raises(ConfigError, match="--engine packed: "):
        choose(base, tokenizer, engine="packed")


def test_why_stablelm_and_mpt_show_no_wrong_number(tokenizer):
    """MPT computes attention without transformers' interface, so there is no packed engine for it. StableLM's attention
    function does not get the description of the rows, so the engine's first forward fails."""
    with pytest.raises(ModelError, match="MptForCausalLM computes attention without transformers' attention interface"):
        packed_engine(freeze(small_base("mpt"), FP32), FP32, 100)
    base = freeze(small_base("stablelm"), FP32)
    packed, padded = packed_engine(base, FP32, 100), padded_engine(base, tokenizer, FP32, 100)
    result = compare(packed, padded, PROMPT, ROWS)
    assert result.failure == "StableLmAttention gets no keyword arguments of the model's forward"
    assert not result.is_right(FP32)
    assert result.failure in choose(small_base("stablelm"), tokenizer).how
