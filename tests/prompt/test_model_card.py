"""Model cards: their code runs as it stands, their metadata is what the hub reads, and they name no path."""

import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from helpers.adapters import write_adapter
from huggingface_hub import ModelCard

from softprompt.config.loader import train_config
from softprompt.data.language import language_of
from softprompt.prompt.adapter_io import Adapter, load_adapter
from softprompt.prompt.card_tables import MAX_POINTS, curve_table, examples_table, text_cell
from softprompt.prompt.model_card import CardFacts, model_card
from softprompt.prompt.public_names import hub_ids

METRICS = {"eval_loss": 0.5, "eval_loss_base": 3.0, "eval_accuracy": 0.9, "eval_macro_f1": 0.8, "train_runtime": 12.0}
ADAPTER = Adapter(torch.zeros(2, 4), {"base_model_name_or_path": "some/base"}, {})


def card(adapter: Adapter = ADAPTER, **facts) -> str:
    return model_card(adapter, CardFacts(**facts)).decode()


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)


@pytest.mark.parametrize("repository", [None, "me/prompt"])
@pytest.mark.parametrize("kind", ["mini", "hub", "local"])
def test_the_code_runs_as_it_stands(kind, repository, tiny_base, tmp_path, monkeypatch, capsys):
    """In the adapter's folder; a published card anywhere. Folders stand in for what the hub would give."""
    monkeypatch.chdir(tmp_path)
    base = {"mini": "mini", "hub": "some/base", "local": str(tiny_base)}[kind]
    folder = write_adapter(tmp_path / "a", base, 3, hidden_size=128 if kind == "mini" else 32)
    adapter = load_adapter(folder)
    hub = {"model_name_or_path": "some/base"} if kind == "hub" else {"model_name_or_path": None}
    text = card(adapter, hub=hub, repository=repository)
    here = tmp_path if repository else folder
    if repository:
        (tmp_path / "me").mkdir()
        folder.rename(tmp_path / repository)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repository: repository)
    if kind == "hub":
        shutil.copytree(tiny_base, here / "some/base")
    if kind == "local" and repository:
        shutil.copytree(tiny_base, here / tiny_base.name)
    monkeypatch.chdir(here)
    ours, pefts = code_blocks(text)
    answers = []
    for code in (ours.replace("'…'", "'…', do_sample=False, max_new_tokens=8"), pefts.replace("=64", "=8")):
        capsys.readouterr()
        made: dict = {}
        exec(code, made)
        answers.append(capsys.readouterr().out.strip())
        prompts = made["model"].adapters if "SoftPromptModel" in made else None
        prompt = prompts.popitem()[1].prompt if prompts else made["model"].get_prompt(1)[0].detach()
        assert torch.equal(prompt.float(), adapter.prompt)
    assert answers[0] == answers[1] != ""


@pytest.mark.parametrize("template", ["default", "chat", "问：{q}\\n文：{text}\\n答："])
def test_the_code_asks_in_the_template(template, monkeypatch):
    adapter = Adapter(torch.zeros(2, 4), {"base_model_name_or_path": "some/base"}, {"template": template})
    ours, pefts = code_blocks(card(adapter))
    compile(ours, "card", "exec")
    compile(pefts, "card", "exec")
    asked = {"default": "Human: …\\n\\nAssistant: ", "chat": "apply_chat_template"}
    assert asked.get(template, "问：…\\n文：…\\n答：") in pefts
    assert ("'text': '…'" in ours) == (template not in asked)


def test_metadata_is_what_the_hub_reads():
    settings = {"dataset": "some/rows", "model_name_or_path": "some/base"}
    data = ModelCard(card(settings=settings, metrics=METRICS, language="zh", repository="me/prompt")).data
    assert (data.base_model, data.language, data.datasets) == ("some/base", "zh", ["some/rows"])
    assert (data.library_name, data.pipeline_tag, data.model_name) == ("peft", "text-generation", "prompt")
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    assert found == {"accuracy": 0.9, "f1": 0.8, "loss": 0.5}
    assert {result.dataset_type for result in data.eval_results} == {"some/rows"}


def test_metadata_leaves_out_what_is_not_on_the_hub(tmp_path):
    for dataset in (str(tmp_path), "rows.jsonl", "mini:sentiment"):
        settings = {"dataset": dataset, "model_name_or_path": "mini"}
        data = ModelCard(card(settings=settings, metrics=METRICS)).data
        assert data.datasets is None and data.language is None
        assert {result.dataset_type for result in data.eval_results} == {"custom"}
    assert ModelCard(card()).data.eval_results is None
    assert hub_ids({"model_name_or_path": str(tmp_path), "dataset": "a.csv"}).keys() == hub_ids({}).keys()
    assert set(hub_ids({"model_name_or_path": str(tmp_path), "dataset": "a.csv"}).values()) == {None}


def test_results_rows_curve_and_verdict_are_shown():
    history = [
        {"step": 0, "sweep": {}},
        *({"step": n, "loss": 4.0 / n} for n in range(1, 31)),
        {"step": 30, "eval_loss": 0.5},
    ]
    examples = [{"question": "好？", "expected": "是", "before": "否", "after": "是"}]
    text = card(metrics=METRICS, history=history, examples=examples, compared=True, verdict="Better than the base.")
    assert "Better than the base." in text and "| 3.0000 | 0.5000 |" in text and "| 90.0% |" in text
    assert "| 好？ | 是 | ✗ 否 | ✓ 是 |" in text
    curve = text.partition("## Training curve")[2].partition("## ")[0].strip().splitlines()[2:]
    assert len(curve) == MAX_POINTS and curve[0].startswith("| 1 |") and curve[-1].startswith("| 30 |")
    bars = [line.count("█") for line in curve]
    assert bars == sorted(bars, reverse=True) and bars[0] > bars[1] > bars[-1] > 0 and "0.5000" in curve[-1]
    assert "0.5000" not in card(metrics={"train_loss": 1.0})


def test_metrics_have_their_intervals_and_only_numbers_are_shown():
    given = {
        **METRICS,
        "eval_loss_low": 0.4,
        "eval_loss_high": 0.6,
        "eval_samples": 200,
        "verdict": "Of use.",
        "epoch": 1,
    }
    text = card(metrics={**given, "verdict_better": True, "eval_odd_thing": 2})
    assert "| 3.0000 | 0.5000 (0.4000–0.6000) |" in text and "95 % interval" in text and "| 90.0% |" in text
    assert "| held-out rows |  | 200 |" in text and "| odd thing |  | 2 |" in text
    assert text.count("Of use.") == 1 and "verdict" not in text and "| epoch" not in text


def test_curves_without_points_or_values():
    assert curve_table([]) == curve_table([{"step": 1, "loss": 1.0}]) == []
    assert len(curve_table([{"step": 1, "loss": None}, {"step": 2, "loss": 0.0}])) == 5
    many = [{"step": n, "loss": 1.0} | ({"eval_loss": 1.0} if n % 5 == 0 else {}) for n in range(1, 200)]
    assert len(curve_table(many)) == MAX_POINTS + 3 and all("| 1.0000 | 1.0000 |" in x for x in curve_table(many)[2:-1])


def test_only_changed_settings_are_shown():
    config = train_config(output_dir="a/run", num_virtual_tokens=3, seed=7, device="cpu", report_to="tensorboard")
    settings = {**config.as_dict(), "learning_rate": config.learning_rate()}
    shown = dict(re.findall(r"^\| (\w+) \| (.*) \|$", card(settings=settings).partition("## Settings")[2], re.M))
    del shown["setting"]
    assert shown == {"preset": "mini", "num_virtual_tokens": "3", "seed": "7"}


def test_texts_of_rows_cannot_change_the_page():
    evil = "<b>|*x*\n[a](b) `c` \\ " + "long " * 99
    (row,) = examples_table([{"question": evil, "expected": "", "before": "", "after": ""}], False)[2:-1]
    assert "<b>" not in row and "\n" not in row and len(row) < 300
    assert row.startswith("| &lt;b&gt;\\|\\*x\\* \\[a\\](b) \\`c\\` \\\\ long")
    assert text_cell(" a \n b ") == "a b"


@pytest.mark.parametrize(
    "texts, language",
    [
        (["今天发现这键盘耐用", "正面", "那大巴质量次"], "zh"),
        (["Rewrite the sentence in the passive voice: he opened a window of the house.", "It is done."], "en"),
        (["Schreiben Sie den Satz um: er hat ein Fenster des Hauses geöffnet."], None),
        (["これは日本語の文章です。とても長い文章です。"], None),
        (["good", "bad"], None),
        ([], None),
    ],
)
def test_the_language_of_rows(texts, language):
    assert language_of({"instruction": text, "n": 3} for text in texts) == language


def test_a_local_base_is_named_by_its_last_component(tmp_path):
    base = tmp_path / "secret" / "bloom"
    base.mkdir(parents=True)
    adapter = Adapter(torch.zeros(2, 4), {"base_model_name_or_path": str(base)}, {})
    for repository in (None, "me/prompt"):
        text = card(adapter, settings={"dataset": str(base / "rows.jsonl")}, repository=repository)
        assert "secret" not in text and "bloom" in text and "rows.jsonl" in text and str(Path.home()) + "/" not in text
