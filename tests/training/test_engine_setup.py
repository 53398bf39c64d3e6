"""The engine of a run gets no row that is longer than those that its check covers."""

import json
from pathlib import Path

import pytest
from helpers.short_runs import ROWS
from helpers.small_bases import small_base

import softprompt
from softprompt.data.examples import Example
from softprompt.engines.microbatch_engine import MicrobatchEngine
from softprompt.evaluation.classifier import Classifier
from softprompt.training import engine_setup

LABELS = ("好", "坏极了坏极了坏极了")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_no_row_is_longer_than_the_longest_that_is_checked(kind, run_settings, tokenizer, monkeypatch):
    """A held-out question is joined with every label, and the longest question's own answer is a short one."""
    small_base(kind).save_pretrained("base")
    tokenizer.save_pretrained("base")
    rows = [{"instruction": "第" * (3 + 9 * (n % 2 == 0)), "output": LABELS[n % 2]} for n in range(len(ROWS))]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    checked, lengths = [], []
    choose, row_losses = engine_setup.choose_engine, MicrobatchEngine.row_losses

    def recorded(config, base, tokenizer, dtype, prompt, examples, longest, *more):
        chosen = choose(config, base, tokenizer, dtype, prompt, examples, longest, *more)
        checked.append(longest)
        lengths.clear()  # those of the check itself
        return chosen

    def recording(self, prompt, examples, *more):
        lengths.extend(len(example.input_ids) for example in examples)
        return row_losses(self, prompt, examples, *more)

    monkeypatch.setattr(engine_setup, "choose_engine", recorded)
    monkeypatch.setattr(MicrobatchEngine, "row_losses", recording)
    run = softprompt.train(**{**run_settings, "model_name_or_path": "base", "max_steps": 1, "num_virtual_tokens": 2})
    assert "eval_accuracy" in run.metrics
    own = max(len(e.input_ids) for part in (run.setup.data.train, run.setup.data.held_out) for e in part.examples)
    assert checked == [max(lengths)] and max(lengths) > own


def test_the_longest_row_fits_the_positions_of_the_base():
    classifier = Classifier(["a", "b"], ["a"], [[[5], [5] * 4]], max_positions=12)
    rows = [Example([7] * 6 + [5], [-100] * 6 + [5])]
    assert [classifier.longest_row(rows, P) for P in (0, 2, 5)] == [10, 10, 7]
