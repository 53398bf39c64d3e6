"""Reports of runs: their content, what they must not do, and bad input."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.programs import refused, run_program
from helpers.reported_runs import Seen, settings_in
from helpers.short_runs import interrupted
from safetensors.torch import load_file, save

import softprompt
import train
from softprompt import cli
from softprompt.prompt.nearest_tokens import EmbeddingSpace, readable_tokens
from softprompt.report import after_training
from softprompt.report.args import parse_report
from softprompt.report.collect import GENERATED_EXAMPLES
from softprompt.report.nearest_words import describe_prompt
from softprompt.report.page import page
from softprompt.report.writer import report, report_file
from softprompt.runs.file_names import START_FILE
from softprompt.runs.run_reader import read_run
from softprompt.training.callbacks import RunCallbacks
from softprompt.utils.errors import ConfigError, PartialFailureError, ReportError

REPORT = SimpleNamespace(main=cli.report, __name__="report")


def seen(folder) -> Seen:
    return Seen(Path(folder, "report.html").read_text(encoding="utf-8"))


@pytest.fixture
def settings(tiny_base, tmp_path) -> dict:
    return settings_in(tmp_path, tiny_base)


@pytest.fixture(scope="module")
def run(tiny_base, tmp_path_factory) -> Path:
    """The folder of a finished run, which tests do not change."""
    folder = tmp_path_factory.mktemp("reported")
    return Path(softprompt.train(**settings_in(folder, tiny_base)).output_dir)


def test_a_run_writes_its_report(run):
    told = seen(run)
    results = json.loads((run / "all_results.json").read_text())
    for name in ("eval_loss", "eval_loss_base"):
        assert f"{results[name]:.4f}" in told.text
    for text in ("finished after step 6 of 6", "20", "learning_rate", "0.1", "Loss", "Gradient norm", "Learning rate"):
        assert text in told.text
    charts = [attributes["aria-label"] for tag, attributes in told.elements if tag == "svg"]
    assert len(set(charts)) == len(charts)
    for metric in ("Loss", "Exact match", "Learning rate", "Gradient norm", "Tokens per second", "Lengths", "Cosine"):
        assert any(label.startswith(metric) for label in charts), metric
    assert f"--adapter {run}" in told.text


def test_settings_with_their_defaults_are_folded(run):
    html = (run / "report.html").read_text(encoding="utf-8")
    chosen, unchanged = re.split(r"<summary>\d+ settings with their defaults</summary>", html)
    assert "<span>max_length</span><bdi>128</bdi>" in chosen
    assert "<span>num_virtual_tokens</span><bdi>10</bdi>" in unchanged  # not given


def test_a_learning_rate_sweep_is_shown_but_not_in_the_curves(run, tmp_path):
    shutil.copytree(run, folder := tmp_path / "swept")
    noted = {"learning_rate": 0.7, "sweep": {"0.001": 3.25, "0.7": 1.5}}
    metrics, facts_file = folder / "metrics.jsonl", folder / "report.json"
    old = metrics.read_text(encoding="utf-8")
    metrics.write_text(json.dumps({"step": 0, "epoch": 0.0, **noted}) + "\n" + old, encoding="utf-8")
    told = {**json.loads(facts_file.read_text(encoding="utf-8")), "sweep": noted["sweep"]}
    facts_file.write_text(json.dumps(told), encoding="utf-8")
    before = read_run(run).series("learning_rate")
    assert read_run(folder).series("learning_rate") == before and before
    report(folder)
    assert "0.001: 3.2500, 0.7: 1.5000." in seen(folder).text
    assert "--find_learning_rate compared" not in seen(run).text


def test_the_page_loads_no_other_file(run):
    told = seen(run)
    assert {"iframe", "link", "object", "embed", "img"}.isdisjoint(tag for tag, _ in told.elements)
    for tag, attributes in told.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,")), (tag, attributes[name])
    policy = next(a["content"] for t, a in told.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    ids = [a["id"] for _, a in told.elements if "id" in a]
    assert len(ids) == len(set(ids))


def test_text_of_rows_is_escaped(run):
    told = seen(run)
    assert "<script>alert(1)</script><img src=x onerror=alert(2)>\N{REPLACEMENT CHARACTER}" in told.text
    assert "<b>好</b>" in told.text and "{{ 7*7 }}" in told.text


def test_charts_use_the_colors_of_the_page_and_contain_no_text_of_the_user(run):
    html = (run / "report.html").read_text(encoding="utf-8")
    pictures = "".join(re.findall(r"<svg .*?</svg>", html, re.S))
    assert "var(--c0)" in pictures and "optimizer step" in pictures
    assert not re.search(r"[\u3000-\u9fff]|(fill|stroke)[=:]|#[0-9a-f]{3}", pictures)


def test_report_json_describes_the_run(run, tokenizer):
    told = json.loads((run / "report.json").read_text(encoding="utf-8"))
    rows = told["rows"]["training"]
    assert rows["rows"] == 20 and rows["used"] == 20 and rows["longest"] <= 128
    assert sum(count for _, count in rows["histogram"]) == 20 and rows["histogram"][-1][0] >= rows["longest"]
    assert rows["cut at max_length"] >= 0 and told["rows"]["held out"]["rows"] == 4
    start, end = load_file(run / "prompt_start.safetensors"), load_file(run / "adapter_model.safetensors")
    start, end = start["prompt_embeddings"], end["prompt_embeddings"]
    likeness = told["end"]["likeness"]
    assert likeness["P"] == 10 and likeness["layernorm"] is True and len(likeness["similarities"]) == 10
    for token, distance in zip(likeness["tokens"], (end - start).norm(dim=1).tolist(), strict=True):
        assert token["moved"] == pytest.approx(distance, abs=1e-4) and distance > 0.1
        assert len(token["nearest"]) == 5 and token["nearest"][0][1] >= token["nearest"][4][1]
    examples = told["end"]["examples"]
    assert examples["of"] == "held-out" and examples["compared"] and len(examples["rows"]) == 4
    assert examples["rows"][0]["expected"] in ("坏", "<b>好</b>")
    assert "prompt_start.safetensors" not in {p.name for p in (run / "checkpoint-6").iterdir()}


def test_nearest_words_and_moves_of_known_vectors(tokenizer):
    noise = torch.randn(len(tokenizer) + 5, 8, generator=torch.Generator().manual_seed(0))
    words = torch.nn.functional.normalize(noise)
    start = words[[10, 20]]
    found = describe_prompt(EmbeddingSpace(words, None), tokenizer, torch.stack([3 * words[30], words[20]]), start)
    first, second = found["tokens"]
    assert first["nearest"][0] == (readable_tokens(tokenizer, [30])[0], 1.0)
    assert first["moved"] == pytest.approx((3 * words[30] - words[10]).norm().item(), abs=1e-4) and first["of"] == 1
    assert first["cosine"] == pytest.approx((words[30] @ words[10]).item(), abs=1e-4)
    assert second["moved"] == 0 and second["cosine"] == 1 and second["start"][1] == 1


def test_long_answers_are_generated_for_the_report(settings, tmp_path):
    rows = [{"instruction": f"第{i}题", "output": "好" * 40} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    softprompt.train(**{**settings, "max_length": 256})
    examples = json.loads((tmp_path / "run/report.json").read_text())["end"]["examples"]
    assert not examples["compared"] and len(examples["rows"]) == GENERATED_EXAMPLES and examples["new_tokens"] == 64
    model = softprompt.SoftPromptModel.from_pretrained(settings["model_name_or_path"], tmp_path / "run")
    for adapter, name in (("none", "before"), (None, "after")):
        answer = model.generate(rows[8]["instruction"], adapter=adapter, do_sample=False, max_new_tokens=64)
        assert examples["rows"][0][name] == answer
    assert "No answers" not in seen(tmp_path / "run").text


def test_without_held_out_rows_training_rows_are_shown(settings, tmp_path):
    softprompt.train(**{**settings, "eval_rows": 0, "eval_steps": None, "max_steps": 1})
    told = seen(tmp_path / "run").text
    assert "trained on these rows" in told and "base alone" in told and "held out, base" not in told


def test_a_streamed_base_has_nearest_words_and_no_answers(settings, tmp_path):
    softprompt.train(**{**settings, "stream_base": True, "max_steps": 1})
    told = json.loads((tmp_path / "run/report.json").read_text())["end"]
    assert len(told["likeness"]["tokens"]) == 10 and told["examples"]["left_out"] in seen(tmp_path / "run").text
    assert not told["examples"]["rows"]


def test_a_base_without_layer_norm_over_its_embeddings(settings, tmp_path, tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    softprompt.train(**{**settings, "model_name_or_path": str(tmp_path / "gpt2"), "max_steps": 1})
    assert "among the word embeddings" in seen(tmp_path / "run").text


@pytest.mark.parametrize("where", ["page", "describe_prompt", "example_answers", "loss_plot"])
def test_an_error_in_the_report_does_not_affect_the_run(where, settings, tmp_path, capsys, monkeypatch):
    def broken(*_):
        raise MemoryError("nothing\nleft")

    monkeypatch.setattr(after_training, where, broken)
    argv = [part for name, value in settings.items() for part in (f"--{name}", value)]
    out, err = run_program(train, argv, capsys, monkeypatch)
    assert "Try: python infer.py" in out and (tmp_path / "run/all_results.json").exists()
    if where == "page":
        (line,) = [line for line in err.splitlines() if "report" in line]
        assert line.startswith("warning: no report.html: MemoryError: nothing left; ")
        assert line.endswith(f"python -m softprompt report {tmp_path / 'run'}")
        assert not (tmp_path / "run/report.html").exists()
    elif where == "loss_plot":
        assert "warning: no loss.png: MemoryError: nothing left" in err and (tmp_path / "run/report.html").exists()
    else:
        name = {"describe_prompt": "nearest words", "example_answers": "examples"}[where]
        assert f"No {name}: MemoryError: nothing left" in seen(tmp_path / "run").text


@pytest.mark.pictures
def test_with_matplotlib_there_is_a_plot_of_the_loss(settings, tmp_path):
    pytest.importorskip("matplotlib")
    softprompt.train(**{**settings, "max_steps": 2})
    assert (tmp_path / "run/loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_resumed_run_keeps_its_initial_prompt(settings, tmp_path):
    softprompt.train(**settings)
    expected = json.loads((tmp_path / "run/report.json").read_text())["end"]["likeness"]
    start = (tmp_path / "run/prompt_start.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run")
    interrupted(settings, 5)
    assert (tmp_path / "run/prompt_start.safetensors").read_bytes() == start
    elsewhere = {"output_dir": str(tmp_path / "other"), "resume_from_checkpoint": str(tmp_path / "run")}
    softprompt.train(**elsewhere)
    softprompt.train(resume_from_checkpoint=str(tmp_path / "run"))
    for name in ("run", "other"):
        assert (tmp_path / name / "prompt_start.safetensors").read_bytes() == start
        assert json.loads((tmp_path / name / "report.json").read_text())["end"]["likeness"] == expected


def test_a_run_that_has_not_ended(settings, tmp_path, capsys, monkeypatch):
    interrupted(settings, 5)
    out, _ = run_program(REPORT, [tmp_path / "run"], capsys, monkeypatch)
    assert out.splitlines()[-1] == f"{tmp_path / 'run/report.html'}"
    told = seen(tmp_path / "run").text
    assert "not finished: its metrics end at step 4 of 6" in told and "--adapter" not in told
    assert f"--resume_from_checkpoint {tmp_path / 'run'}" in told
    assert "nearest words" in told  # of its newest checkpoint
    before = json.loads((tmp_path / "run/report.json").read_text())
    assert "end" not in before and before["base_alone"]["eval_loss_base"] > 0
    start = tmp_path / "run" / START_FILE
    whole = start.read_bytes()
    start.write_bytes(whole[:-5])
    run_program(REPORT, [tmp_path / "run"], capsys, monkeypatch)
    assert "not recorded" in seen(tmp_path / "run").text
    start.write_bytes(whole)
    softprompt.train(resume_from_checkpoint=str(tmp_path / "run"))
    assert "finished after step 6 of 6" in seen(tmp_path / "run").text


def test_a_run_says_why_it_ended_early(settings, run, tmp_path):
    softprompt.train(**{**settings, "early_stopping_patience": 1, "early_stopping_threshold": 100.0})
    assert "ended early at step 4 of 6, because the metric no longer improved" in seen(tmp_path / "run").text
    assert json.loads((run / "report.json").read_text())["ended_early"] is None


def test_a_finished_run_that_is_continued(settings, tmp_path):
    softprompt.train(**settings)
    interrupted({"max_steps": 9, "resume_from_checkpoint": str(tmp_path / "run")}, 9)
    report(tmp_path / "run")
    assert "not finished: its metrics end at step 8 of 9" in seen(tmp_path / "run").text


def test_several_runs_side_by_side(settings, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    softprompt.train(**{**settings, "learning_rate": 0.01, "num_virtual_tokens": 3, "output_dir": "另一个"})
    out, _ = run_program(REPORT, [run, "另一个"], capsys, monkeypatch)
    file = Path("runs/report-run-另一个.html")
    assert out.splitlines()[-1] == str(file)
    told = Seen(file.read_text(encoding="utf-8"))
    assert "2 runs compared" in told.text and "Training loss" in told.text and "另一个, base alone" not in told.text
    settings_that_differ = told.text[told.text.index("Settings that differ") : told.text.index("learned from")]
    for text in ("learning_rate", "0.01", "0.1", "num_virtual_tokens", "3", "10"):
        assert text in settings_that_differ
    assert "model_name_or_path" not in settings_that_differ
    file.write_text("mine")
    line = refused(REPORT, [run, "另一个"], capsys, monkeypatch, tmp_path)
    assert "report-run-另一个.html: exists" in line


def test_a_page_about_runs_with_long_or_equal_names_has_a_short_name_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    long, equal = [f"{'很长的名字' * 10}-{n}" for n in range(2)], ["a/run", "b/run", "c/run"]
    for folder in (*long, *equal):
        Path(folder).mkdir(parents=True)
    files = [report_file(runs, None) for runs in (long, long[::-1], equal, equal[:2])]
    assert len(set(files)) == 4 and all(
        len(file.name.encode()) <= 120 and file.parent == Path("runs") for file in files
    )


@pytest.mark.parametrize(
    "name, content",
    [("metrics.jsonl", ""), ("report.json", "{"), ("report.json", '{"prompt": 3, "end": {}}'), ("everything", None)],
)
def test_a_broken_run_is_named_and_the_others_are_shown(name, content, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content is None:
        (folder := tmp_path / "run").mkdir()
    else:
        folder = spoiled(run, tmp_path, name, content)
    second = shutil.copytree(run, tmp_path / "second")
    with pytest.raises(PartialFailureError, match="1 of 3 runs cannot be shown") as failed:
        report(run, folder, second)
    assert failed.value.exit_code == 1 and str(folder) in str(failed.value)
    (file,) = Path("runs").glob("report-*.html")
    told = Seen(file.read_text(encoding="utf-8"))
    assert "2 runs compared" in told.text and f"A run is not shown: {folder}" in told.text.replace("\n", " ")
    with pytest.raises(ReportError) as refused:  # a wrong name, or nothing else to show
        report(run, tmp_path / "nowhere")
    assert refused.value.exit_code == 2
    shutil.copytree(folder, tmp_path / "broken too")
    with pytest.raises(ReportError):
        report(folder, tmp_path / "broken too")


def test_runs_with_the_same_name_are_shown_with_their_paths(run, tmp_path):
    shutil.copytree(run, tmp_path / "other" / run.name)
    path = report(run, tmp_path / "other" / run.name, output_file=tmp_path / "both.html")
    assert str(tmp_path / "other" / run.name) in Seen(path.read_text()).text


def test_a_run_without_report_json_is_shown(run, tmp_path):
    old = shutil.copytree(run, tmp_path / "old")
    (old / "report.json").unlink()
    (old / "prompt_start.safetensors").unlink()
    report(old)
    told = seen(old).text
    assert "its rows and settings are unknown" in told and "Loss" in told
    assert "not recorded" in told


def test_a_base_whose_size_has_changed(run, tmp_path):
    folder = spoiled(run, tmp_path, "report.json", None)
    config = json.loads((folder / "adapter_config.json").read_text())
    prompt = torch.zeros(config["num_virtual_tokens"], 8)
    (folder / "adapter_config.json").write_text(json.dumps({**config, "token_dim": 8}))
    (folder / "adapter_model.safetensors").write_bytes(save({"prompt_embeddings": prompt}))
    report(folder)
    assert "No nearest words: adapter" in seen(folder).text and "virtual tokens have size 8" in seen(folder).text


def spoiled(run, tmp_path, name, content) -> Path:
    folder = shutil.copytree(run, tmp_path / "run")
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    return folder


@pytest.mark.parametrize(
    "name, content, told",
    [
        ("metrics.jsonl", None, "has no metrics: metrics.jsonl is missing"),
        ("metrics.jsonl", "", "has no metrics yet: metrics.jsonl is empty"),
        ("metrics.jsonl", '{"step": 1, "loss": 2}\n{"step"\n{"step": 2}\n', "line 2: not JSON"),
        ("metrics.jsonl", "[]\n", "line 1: expected an object with a step"),
        ("report.json", "[]", "expected an object"),
        ("report.json", "{", "report.json: cannot be read"),
        ("report.json", '{"prompt": 3, "end": {}}', "report.json: not in the format of this version"),
        ("report.json", '{"prompt": 3, "end": 5}', "report.json: not in the format of this version"),
        (
            "report.json",
            '{"prompt": [1, 2], "base": {"type": 1, "parameters": 2}, "end": {"examples": 3}}',
            "report.json",
        ),
    ],
)
def test_broken_runs_are_refused_in_one_line(name, content, told, run, tmp_path, capsys, monkeypatch):
    folder = spoiled(run, tmp_path, name, content)
    line = refused(REPORT, [folder], capsys, monkeypatch, tmp_path)
    assert told in line and str(folder) in line


def test_the_last_line_of_the_metrics_may_be_incomplete(run, tmp_path):
    folder = spoiled(run, tmp_path, "metrics.jsonl", '{"step": 1, "loss": 2.5, "grad_norm": null}\n{"step": 2, "lo')
    report(folder)
    assert "held-out loss" in seen(folder).text


def test_a_name_that_is_not_utf_8():
    with pytest.raises(ConfigError, match="is not UTF-8; rename that folder"):
        report("caf\udce9")


def test_folders_that_are_not_runs(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run / name, adapter)
    cases = {
        "nowhere": "no such folder",
        "empty": "holds no run of train.py",
        "adapter": "holds an adapter, and no run of train.py",
        run / "checkpoint-6": "is a checkpoint; name its run",
    }
    for folder, told in cases.items():
        line = refused(REPORT, [tmp_path / folder], capsys, monkeypatch, tmp_path)
        assert told in line and str(folder) in line
    for argv, told in {
        (): "RUN",
        (run, run): "named twice",
        (run, f"{run}/"): "named twice",
        (run, "--output_file="): "--output_file is empty",
    }.items():
        assert told in refused(REPORT, argv, capsys, monkeypatch, tmp_path)
    line = refused(REPORT, [run, "--output_file", tmp_path], capsys, monkeypatch, tmp_path)
    assert "is not a file" in line
    with pytest.raises(ReportError):
        report(tmp_path / "nowhere")
    with pytest.raises(SystemExit):
        parse_report(["--help"])


def test_secrets_are_redacted(run, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "not_to_be_told")
    record = read_run(run)
    record.facts["arguments"]["dataset"] = "https://u:not_to_be_told@x/y"
    assert "not_to_be_told" not in page([record])


def test_a_run_continues_if_report_json_cannot_be_written(settings, tmp_path, capsys, monkeypatch):
    begin, folder = RunCallbacks.begin, tmp_path / "run/report.json"
    monkeypatch.setattr(RunCallbacks, "begin", lambda self: (folder.mkdir(), begin(self))[1])
    softprompt.train(**settings)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: no report")]
    assert "warning: no report.json" in lines[0] and "warning: no report.html" in lines[-1]
    assert (tmp_path / "run/all_results.json").exists()
