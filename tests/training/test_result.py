"""What a run offers after training: a table of its metrics, a model, a plot, and its summary as HTML."""

import json
import re
import sys
from dataclasses import replace

import pandas
import pytest
import torch
from helpers.short_runs import ROWS, WITHOUT_PICTURES

import softprompt
from softprompt.models import loading
from softprompt.training.result import Run
from softprompt.utils.errors import ConfigError

GREEDY = {"do_sample": False, "max_new_tokens": 4}


@pytest.fixture(scope="module")
def run(tiny_base, tmp_path_factory) -> Run:
    """A run of 13 steps with evaluations every 5."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        for name, module in WITHOUT_PICTURES.items():
            patch.setitem(sys.modules, name, module)
        return softprompt.train(
            model_name_or_path=str(tiny_base),
            dataset=folder / "rows.jsonl",
            output_dir=folder / "run",
            eval_rows=4,
            max_steps=13,
            logging_steps=3,
            eval_steps=5,
        )


def test_history_is_a_table(run):
    frame = pandas.DataFrame(run.history)
    assert list(frame.step[frame.loss.notna()]) == [3, 6, 9, 12, 13]
    assert list(frame.step[frame.eval_loss.notna()]) == [5, 10, 13]


def test_the_model_answers_with_this_prompt_and_the_base_in_memory(run, tiny_base, monkeypatch):
    loaded = softprompt.SoftPromptModel.from_pretrained(adapter=run.output_dir)
    monkeypatch.setattr(loading, "_from_pretrained", None)  # nothing is loaded
    model = run.model()
    assert model.base is run.setup.base and torch.equal(model.prompt, loaded.prompt)
    assert model.generate(["你", "好"], **GREEDY) == loaded.generate(["你", "好"], **GREEDY)
    assert (model.name, model.active_adapter) == (str(tiny_base), str(run.output_dir))
    assert repr(model) == repr(loaded) and "10 virtual tokens" in repr(model) and str(tiny_base) in repr(model)


def test_the_model_of_a_streamed_base_is_loaded(run_settings):
    run = softprompt.train(**run_settings, stream_base=True)
    model = run.model()
    assert model.base is not run.setup.base
    loaded = softprompt.SoftPromptModel.from_pretrained(adapter="run")
    assert model.generate("你", **GREEDY) == loaded.generate("你", **GREEDY)


def test_the_summary_is_html(run):
    shown = run._repr_html_()
    assert shown.count("<table>") >= 2 and f"<code>{run.output_dir}</code>" in shown
    assert f"{run.metrics['eval_loss']:.4f}" in shown and f"{run.metrics['eval_loss_base']:.4f}" in shown
    for table in shown.split("<table>")[1:]:
        rows = re.findall("<tr>(.*?)</tr>", table)
        assert len({row.count("<td>") + row.count("<th") for row in rows}) == 1
    assert "<b>" not in replace(run, stopped="<b>")._repr_html_()


@pytest.mark.pictures
def test_plot_draws_the_losses(run):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    axes = run.plot()
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert drawn["training loss"] == [r["loss"] for r in run.history if "loss" in r]
    assert drawn["held-out loss"][-1] == run.metrics["eval_loss"]
    assert run.metrics["eval_loss_base"] in drawn["held-out loss of the base alone"]
    assert run.plot(axes) is axes
    pyplot.close("all")


def test_without_matplotlib_plot_says_how_to_install_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        run.plot()
