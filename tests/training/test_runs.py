"""Whole runs on a tiny base: what they write and print, infer.py after them; settings from flags and files."""

import importlib.util
import json
import os
import re
import shutil

import pytest
import torch
from helpers.adapters import write_adapter
from helpers.programs import run_program
from helpers.short_runs import interrupted
from safetensors.torch import load_file

import infer
import softprompt
import train
from softprompt.config.command_line import parse_inference, parse_training
from softprompt.config.loader import PRESETS, train_config
from softprompt.data.dataset import load_rows
from softprompt.data.template import Template
from softprompt.data.tokenization import tokenize
from softprompt.engines import choice
from softprompt.models.loading import load_tokenizer
from softprompt.training.console import warn_if_bf16_is_slow

ROWS = [{"instruction": f"第{i}题", "output": "好" if i % 2 else "坏"} for i in range(40)]


@pytest.fixture
def flags(tiny_base, tmp_path, monkeypatch):
    """Flags of a run of 6 steps with 4 held-out rows; the current folder is a new one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return [
        *("--model_name_or_path", tiny_base, "--dataset", "rows.jsonl", "--eval_rows", "4", "--max_steps", "6"),
        *("--per_device_train_batch_size", "2", "--gradient-accumulation-steps", "2", "--save_steps", "2"),
        *("--logging_steps", "2", "--save_total_limit", "2"),
    ]


ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "softprompt.json", "README.md"}
STATE = {"optimizer.safetensors", "rng_state.safetensors", "trainer_state.json"}


@pytest.mark.pictures
def test_what_a_run_writes_and_prints(flags, tmp_path, capsys, monkeypatch):
    out, err = run_program(train, [*flags, "--print_model", "--eval_steps", "4"], capsys, monkeypatch)
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("tiny-")
    names = {p.name for p in run.iterdir()}
    expected = ADAPTER | STATE | {"checkpoint-4", "checkpoint-6", "metrics.jsonl", "all_results.json"}
    expected |= {"run_manifest.json"}
    expected |= {"report.html", "report.json", "prompt_start.safetensors"}
    expected |= {"loss.png"} if importlib.util.find_spec("matplotlib") else set()
    assert names == expected
    assert {p.name for p in (run / "checkpoint-6").iterdir()} == ADAPTER | STATE | {"checksums.json", "metrics.jsonl"}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [2, 4, 4, 6, 6]
    assert set(records[0]) == {"step", "epoch", "loss", "grad_norm", "learning_rate", "tokens_per_second"}
    assert {"eval_loss", "eval_perplexity", "eval_exact_match"} < set(records[2])
    results = json.loads((run / "all_results.json").read_text())
    for name in ("eval_loss", "eval_exact_match"):
        assert {name, f"{name}_base"} < set(results)
    assert results["train_runtime"] > 0 and results["train_tokens_per_second"] > 0
    last, saved = (load_file(f / "adapter_model.safetensors")["prompt_embeddings"] for f in (run / "checkpoint-6", run))
    assert torch.equal(last, saved) and saved.shape == (10, 32)
    assert all(path.read_bytes()[1:4] == b"PNG" for path in run.glob("*.png"))
    assert "trainable params: 320 || all params: " in out and "(prompt): PromptEmbedding(10, 32)" in out
    assert "40" not in out.split("rows")[0] and "36 rows, columns instruction, input, output" in out
    assert "Try: python infer.py --prompt" in out and "base alone" in out
    assert "step 2  epoch" in err and "\r" not in err  # no terminal: plain lines


def test_nothing_is_evaluated_without_held_out_rows(flags, tmp_path, capsys, monkeypatch):
    at = flags.index("--eval_rows")
    out, _ = run_program(train, [*flags[:at], *flags[at + 2 :], "--output_dir", "mine"], capsys, monkeypatch)
    results = json.loads((tmp_path / "mine/all_results.json").read_text())
    assert not [name for name in results if name.startswith("eval")]
    assert "40 rows, columns" in out and "infer.py --adapter mine --prompt" in out


def test_infer_uses_the_newest_run_and_agrees_with_the_api(flags, tiny_base, tmp_path, capsys, monkeypatch):
    run_program(train, [*flags, "--template", "问：{instruction}\\n答："], capsys, monkeypatch)
    greedy = ["--do_sample", "false", "--max_new_tokens", "4"]
    out, err = run_program(infer, ["--prompt", "第3题", *greedy], capsys, monkeypatch)
    model = softprompt.SoftPromptModel.from_pretrained()
    assert model.template.spec == "问：{instruction}\\n答："
    answer = model.generate("第3题", do_sample=False, max_new_tokens=4)
    assert out == answer + "\n" and "runs/tiny-" in err
    (tmp_path / "q.txt").write_text("第3题\n第4题\n", encoding="utf-8")
    out, _ = run_program(infer, ["--prompts_file", "q.txt", *greedy], capsys, monkeypatch)
    lines = [json.loads(line) for line in out.splitlines()]
    assert lines[0] == {"prompt": "第3题", "adapter": model.active_adapter, "text": answer} and len(lines) == 2
    out, err = run_program(infer, ["--adapter", "none", "--prompt", "第3题", *greedy], capsys, monkeypatch)
    assert "no prompt" in err
    bare = softprompt.SoftPromptModel(model.base, model.tokenizer, None, model.template)
    assert out == bare.generate("第3题", do_sample=False, max_new_tokens=4) + "\n"


def test_samples_repeat_only_with_a_seed(flags, capsys, monkeypatch):
    run_program(train, flags, capsys, monkeypatch)
    ask = ["--prompt", "第3题", "--max_new_tokens", "12", "--temperature", "3", "--top_k", "0"]
    seeded = {run_program(infer, [*ask, "--seed", "5"], capsys, monkeypatch)[0] for _ in range(2)}
    free = {run_program(infer, ask, capsys, monkeypatch)[0] for _ in range(3)}
    assert len(seeded) == 1 and len(free) > 1


def test_renamed_base_is_a_warning(flags, tiny_base, tmp_path, capsys, monkeypatch):
    run_program(train, flags, capsys, monkeypatch)
    shutil.copytree(tiny_base, tmp_path / "copy")
    _, err = run_program(
        infer, ["--model_name_or_path", "./copy", "--prompt", "a", "--max_new_tokens", "2"], capsys, monkeypatch
    )
    assert f" was trained on {tiny_base}, not on ./copy" in err


@pytest.mark.parametrize("rate, warned", [("5e-5", True), ("3e-2", False)])
def test_warning_if_the_learning_rate_cannot_move_the_prompt(rate, warned, flags, capsys, monkeypatch):
    given = ["--learning_rate", rate, "--prompt_tuning_init", "RANDOM"]
    out, _ = run_program(train, [*flags, *given], capsys, monkeypatch)
    assert ("it will not learn" in out) == warned


def test_training_starts_from_a_saved_adapter(flags, capsys, monkeypatch):
    run_program(train, [*flags, "--output_dir", "first", "--num_virtual_tokens", "3"], capsys, monkeypatch)
    argv = [*flags, "--output_dir", "second", "--init_adapter", "first", "--learning_rate", "1e-9"]
    out, _ = run_program(train, argv, capsys, monkeypatch)
    first, second = (
        load_file(f"{name}/adapter_model.safetensors")["prompt_embeddings"] for name in ("first", "second")
    )
    assert torch.allclose(first, second, atol=1e-6) and "initial prompt: the one in first" in out
    assert "was trained on" not in out


def test_a_start_from_an_adapter_of_another_base_is_a_warning(flags, tiny_base, tmp_path, capsys, monkeypatch):
    """It may be meant; a base that is merely named in another way is the same one."""
    write_adapter(tmp_path / "same", os.path.relpath(tiny_base, tmp_path), 3)
    write_adapter(tmp_path / "other", "some/base", 3)
    for name, warned in (("same", 0), ("other", 1)):
        argv = [*flags, "--output_dir", f"of-{name}", "--init_adapter", name]
        out, _ = run_program(train, argv, capsys, monkeypatch)
        lines = [line for line in out.splitlines() if f"adapter {name} was trained on" in line]
        assert len(lines) == warned and all(f"some/base, not on {tiny_base}" in line for line in lines)


def test_python_api(tiny_base, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    settings = {"dataset": str(tmp_path / "rows.jsonl"), "model_name_or_path": str(tiny_base), "max_steps": 2}
    run = softprompt.train(**settings, output_dir=str(tmp_path / "run"), fp16=True)
    model = softprompt.SoftPromptModel.from_pretrained(str(tiny_base), run.output_dir, bf16=True)
    answers = model.generate(["a", {"instruction": "b", "input": "c"}], seed=1, max_new_tokens=3)
    assert len(answers) == 2 and repr(run).startswith("Run(output_dir=")
    with pytest.raises(softprompt.utils.errors.ConfigError, match="unknown generation setting"):
        model.generate("a", num_beam=3)
    with pytest.raises(softprompt.utils.errors.DataError, match="column 'instruction' must be a text"):
        model.generate([{"text": "a"}])


def test_presets():
    article, bloom, mini = (train_config(name) for name in ("article", "bloom-1b4-zh", "mini"))
    assert PRESETS["article"] == {**PRESETS["bloom-1b4-zh"], "learning_rate": 5e-5}
    assert article.learning_rate() == 5e-5 and bloom.learning_rate() == 0.3
    for config in (article, train_config(model_name_or_path="a", dataset="b")):
        args = config.training
        assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (4, 8)
        assert (args.logging_steps, args.num_train_epochs, args.save_steps, args.seed) == (10, 1, 500, 42)
        assert (args.max_grad_norm, args.lr_scheduler_type, args.warmup_steps, args.weight_decay) == (1, "linear", 0, 0)
        assert config.data.max_length == 256
    assert article.prompt.prompt_tuning_init == mini.prompt.prompt_tuning_init == "RANDOM"
    assert article.model.model_name_or_path == "Langboat/bloom-1b4-zh"
    assert (mini.model.model_name_or_path, mini.data.dataset) == ("mini", "mini:sentiment")
    assert parse_training(["--dataset", "mini:reply"]).preset == "mini"
    json.dumps(article.as_dict())


def test_flags_override_the_file_and_the_file_the_preset(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('preset = "article"\nlearning_rate = 1e-3\nnum-virtual-tokens = 7\nbf16 = true\nmax_grad_norm = 2')
    config = parse_training(["--config", str(file), "--num-virtual-tokens", "8", "--bf16", "false"])
    assert config.preset == "article" and config.training.learning_rate == 1e-3
    assert config.prompt.num_virtual_tokens == 8 and config.model.bf16 is False
    assert config.training.max_grad_norm == 2.0
    assert parse_training(["--bf16"]).model.bf16 is True
    assert parse_inference(["--prompt", "a", "--do_sample"]).generation.do_sample is True


@pytest.mark.parametrize("engine", ["packed", "padded"])
def test_dry_run_describes_the_run_and_writes_nothing(engine, flags, tmp_path, capsys, monkeypatch):
    before = sorted(tmp_path.rglob("*"))
    out, _ = run_program(train, [*flags, "--dry_run", "--engine", engine], capsys, monkeypatch)
    assert sorted(tmp_path.rglob("*")) == before
    told = out[out.index("Dry run") :]
    data = tokenize(load_rows("rows.jsonl", Template(), {})[:36], load_tokenizer(flags[1]), Template(), 256)
    tokens = sum(len(e.input_ids) for e in data.examples)
    assert re.search(rf"rows +36 with {tokens} tokens", told) and re.search(r"steps +6 of 4 rows", told)
    assert re.search(r"parameters +320 learned, [\d,]+ frozen", told)
    assert re.search(r"memory +about [\d.]+ GiB", told) and re.search(r"time +about \d+ s at [\d,]+ tokens/s", told)


def test_a_dry_run_does_not_repeat_long_steps(flags, capsys, monkeypatch):
    monkeypatch.setattr("softprompt.training.dry_run.ENOUGH", 0.0)
    out, _ = run_program(train, [*flags, "--dry_run"], capsys, monkeypatch)
    assert "(measured over 1 step)" in out


def test_tokens_per_microbatch_is_printed_and_saved(flags, tmp_path, capsys, monkeypatch):
    out, _ = run_program(
        train, [*flags, "--engine", "packed", "--tokens_per_microbatch", "50", "--output_dir", "r"], capsys, monkeypatch
    )
    assert "packed engine, 50 tokens at a time" in out
    state = json.loads((tmp_path / "r/checkpoint-6/trainer_state.json").read_text())
    assert state["engine"] == {"engine": "packed", "tokens_per_microbatch": 50, "attn_implementation": "sdpa"}
    out, _ = run_program(
        train,
        [*flags, "--engine", "packed", "--tokens_per_microbatch", "auto", "--gradient-checkpointing"],
        capsys,
        monkeypatch,
    )
    assert "packed engine, 1,024 tokens at a time" in out


def test_warning_if_bf16_is_slow_on_the_cpu(capsys):
    warn_if_bf16_is_slow({torch.bfloat16: 3.0, torch.float32: 1.0}.__getitem__)
    told = "warning: on this CPU a bf16 matrix product takes 3 times as long as one in fp32; leave out --bf16"
    assert told in capsys.readouterr().out
    warn_if_bf16_is_slow({torch.bfloat16: 1.0, torch.float32: 1.0}.__getitem__)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(("speed", "kept"), [(0.1, "padded"), (9.0, "packed")])
def test_a_resumed_run_keeps_its_engine(speed, kept, run_settings, tmp_path, monkeypatch, capsys):
    """Whichever one would be taken now."""
    for number, measured in enumerate((speed, 1 / speed)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache {number}"))
        monkeypatch.setattr(choice, "measure_speed", lambda *args, measured=measured: measured)
        if number == 0:
            interrupted(run_settings, 5)
        else:
            softprompt.train(resume_from_checkpoint="run")
    engines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Base ")]
    assert [f"{kept} engine" in line for line in engines] == [True, True]
