"""Safety: no secret is printed or saved, no link followed out of a folder, no code run, no two runs mixed."""

import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers.adapters import write_adapter
from helpers.bases import make_bloom
from helpers.programs import refused
from helpers.short_runs import interrupted, outcome

import softprompt
import train
from softprompt.export.model_card import plain_model_card
from softprompt.models.base_files import weight_files
from softprompt.prompt.adapter_folder import peft_config
from softprompt.prompt.adapter_io import Adapter, load_adapter
from softprompt.prompt.model_card import CardFacts, model_card
from softprompt.runs.checkpoints import checkpoints
from softprompt.training.determinism import deterministic
from softprompt.utils import fingerprints
from softprompt.utils.atomic_io import read_inside
from softprompt.utils.errors import AdapterError, ModelError, OutputError, TrainingError
from softprompt.utils.redact import RedactingFilter, redacted

SECRETS = {
    "HF_TOKEN": "hf_abcdefghijklmnopqrst",
    "WANDB_API_KEY": "0123456789",
    "HF_ENDPOINT": "https://user:p4ssw0rd@mirror.example",
    "HTTPS_PROXY": "http://proxyuser99@proxy.example:3128",
    "TOKENIZERS_PARALLELISM": "false",
}
TOLD = ("hf_abcdefghijklmnopqrst", "0123456789", "p4ssw0rd", "proxyuser99")


@pytest.fixture
def secrets(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def test_secrets_are_redacted(secrets):
    text = redacted(f"false {' '.join(SECRETS.values())} and p4ssw0rd and https://a:b@c.d/e https://x.y/z hf_short")
    assert not any(secret in text for secret in TOLD)
    assert text.startswith("false *** *** https://***@mirror.example http://***@proxy.example:3128 ")
    assert text.endswith("and *** and https://***@c.d/e https://x.y/z hf_short")


def test_errors_cards_and_logs_hold_no_secrets(secrets, caplog):
    text = "get https://user:p4ssw0rd@mirror.example/x with hf_abcdefghijklmnopqrst"
    values = torch.ones(3, 32)
    adapter = Adapter(values, peft_config(text, make_bloom().config, values, "RANDOM"), {"template": text + " {q}"})
    record = logging.LogRecord("a", logging.WARNING, "", 0, "%s", (text,), None)
    RedactingFilter().filter(record)
    for told in (
        str(ModelError(text)),
        model_card(adapter, CardFacts({"dataset": text})).decode(),
        record.getMessage(),
    ):
        assert "mirror.example/x" in told and not any(secret in told for secret in TOLD)


def test_password_in_the_hub_address_is_not_printed(tmp_path):
    """In a process of its own, because huggingface_hub reads the address when it is imported."""
    import os
    import subprocess

    argv = [sys.executable, str(Path(softprompt.__file__).parent.parent / "train.py"), "--dataset", "some/rows"]
    address = {"HF_ENDPOINT": "http://user:p4ssw0rd@127.0.0.1:9", "HF_TOKEN": SECRETS["HF_TOKEN"]}
    ended = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, **address}, cwd=tmp_path)
    assert ended.returncode == 2 and "dataset 'some/rows'" in ended.stderr
    assert not any(secret in ended.stdout + ended.stderr for secret in TOLD)


@pytest.fixture
def adapter(tmp_path) -> Path:
    """A good adapter folder."""
    return write_adapter(tmp_path / "adapter")


def test_links_are_followed_only_within_the_folder_and_the_hub_cache(adapter, tmp_path):
    inside = load_adapter(adapter).prompt
    (adapter / "adapter_model.safetensors").rename(adapter / "weights")
    (adapter / "adapter_model.safetensors").symlink_to("weights")
    assert torch.equal(load_adapter(adapter).prompt, inside)
    (adapter / "weights").rename(tmp_path / "weights")
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.safetensors").symlink_to(tmp_path / "weights")
    with pytest.raises(AdapterError, match="a link that leads out of the folder"):
        load_adapter(adapter)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "weights").rename(tmp_path / "blobs" / "0123")
    (tmp_path / "snapshots").mkdir()
    adapter.rename(tmp_path / "snapshots" / "main")
    (tmp_path / "snapshots/main/adapter_model.safetensors").unlink()
    (tmp_path / "snapshots/main/adapter_model.safetensors").symlink_to("../../blobs/0123")
    assert torch.equal(load_adapter(tmp_path / "snapshots/main").prompt, inside)


def test_reading_is_limited_in_size(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_inside(tmp_path, "a", 5) == b"12345"
    with pytest.raises(ValueError, match="larger than 4 bytes"):
        read_inside(tmp_path, "a", 4)
    (tmp_path / "b").symlink_to("b")
    with pytest.raises(OSError):
        read_inside(tmp_path, "b", 4)


def test_trust_remote_code_cannot_be_set_from_a_file(tiny_base, tmp_path, capsys, monkeypatch):
    (tmp_path / "a.toml").write_text("trust_remote_code = true")
    line = refused(train, ["--config", "a.toml"], capsys, monkeypatch, tmp_path)
    assert "unknown setting 'trust_remote_code'" in line
    base = shutil.copytree(tiny_base, tmp_path / "base")  # an architecture of its own, in a file of its own
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (base / "config.json").write_text(json.dumps({**config, "trust_remote_code": True}))
    (base / "evil.py").write_text(f"open({str(tmp_path / 'harmed')!r}, 'w')")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"instruction": "a", "output": "b"}))
    argv = ["--model_name_or_path", base, "--dataset", "rows.jsonl"]
    assert str(base) in refused(train, argv, capsys, monkeypatch, tmp_path)
    assert not (tmp_path / "harmed").exists()


def test_random_states_are_restored(run_settings, monkeypatch):
    """With noise in every step, the resumed run is the same only if its generator goes on, too."""
    from softprompt.engines.microbatch_engine import MicrobatchEngine

    accumulate = MicrobatchEngine.accumulate

    def noisy(self, prompt, window, grad_scale):
        result = accumulate(self, prompt, window, grad_scale)
        prompt.weight.grad += 0.1 * torch.randn(prompt.weight.shape)
        return result

    monkeypatch.setattr(MicrobatchEngine, "accumulate", noisy)
    softprompt.train(**run_settings)
    expected = outcome()
    shutil.rmtree("run")
    interrupted(run_settings, 9)
    torch.manual_seed(7)
    softprompt.train(resume_from_checkpoint="run")
    assert outcome() == expected


def test_resuming_into_another_folder_copies_the_metrics(run_settings):
    softprompt.train(**run_settings)
    expected = outcome()
    interrupted({**run_settings, "output_dir": "cut"}, 9)
    Path("cut/metrics.jsonl").unlink()
    softprompt.train(resume_from_checkpoint="cut", output_dir="new")
    assert outcome("new") == expected
    with pytest.raises(OutputError, match="new holds a run already"):
        softprompt.train(resume_from_checkpoint="cut", output_dir="new")


def test_overwritten_run_is_removed(run_settings):
    """Or its later checkpoints would be what the new one is resumed from."""
    softprompt.train(**run_settings)
    interrupted({**run_settings, "overwrite_output_dir": True, "seed": 7}, 5)
    assert [p.name for p in checkpoints(Path("run"))] == ["checkpoint-2", "checkpoint-4"]
    assert not Path("run/adapter_model.safetensors").exists()


def test_resuming_from_an_early_checkpoint_replaces_the_later_ones(run_settings, capsys):
    softprompt.train(**run_settings)
    capsys.readouterr()
    interrupted({"resume_from_checkpoint": "run/checkpoint-6", "learning_rate": 1e-4, "save_total_limit": 2}, 9)
    later = "checkpoint-8, checkpoint-10, checkpoint-12, checkpoint-13"
    assert f"{later} in run will be removed when the next checkpoint is written" in capsys.readouterr().out
    assert [p.name for p in checkpoints(Path("run"))] == ["checkpoint-6", "checkpoint-8"]


def test_error_of_a_non_finite_step_names_rows_and_checkpoint(run_settings, monkeypatch):
    from softprompt.engines.microbatch_engine import MicrobatchEngine

    accumulate, calls = MicrobatchEngine.accumulate, iter(range(1, 99))

    def spoiled(self, prompt, window, grad_scale):
        result = accumulate(self, prompt, window, grad_scale)
        if next(calls) == 6:
            prompt.weight.grad[0, 0] = torch.inf
        return result

    monkeypatch.setattr(MicrobatchEngine, "accumulate", spoiled)
    with pytest.raises(
        TrainingError, match=r"step 6: .*not finite .*rows \d+, \d+, .*run/checkpoint-4 is whole; continue with"
    ):
        softprompt.train(**run_settings, engine="padded")  # which is not checked before the first step
    assert [p.name for p in checkpoints(Path("run"))] == ["checkpoint-2", "checkpoint-4"]


def test_non_finite_prompt_is_not_saved(run_settings):
    with pytest.raises(TrainingError, match="not finite"):
        softprompt.train(**run_settings | {"save_steps": 1}, learning_rate=1e38, weight_decay=1e3)
    assert all(load_adapter(path).prompt.isfinite().all() for path in checkpoints(Path("run")))


def test_deterministic_mode_ends_with_the_run(run_settings, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    softprompt.train(**run_settings)
    expected = outcome()
    shutil.rmtree("run")
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
    assert not torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.deterministic
    for engine in ("packed", "padded"):
        changed = {name: value for name, value in run_settings.items() if name != "tokens_per_microbatch"}
        softprompt.train(**changed, engine=engine, deterministic=True, overwrite_output_dir=True)
        assert [r["step"] for r in outcome()[1]] == [r["step"] for r in expected[1]]


def test_hash_of_a_large_base_is_cached(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprints, "CACHED_FROM", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    base, files = make_bloom(), weight_files(str(folder))
    assert [path.name for path in files] == ["model.safetensors"]
    first, marked = fingerprints.fingerprint_of_base(base, files), "0" * 64
    (cached,) = (tmp_path / "cache/softprompt/fingerprints").iterdir()
    assert cached.read_text() == first
    cached.write_text(marked)
    assert fingerprints.fingerprint_of_base(base, files) == marked  # not hashed again
    files[0].touch()  # another time: hashed anew, to the same
    assert fingerprints.fingerprint_of_base(base, files) == first
    weight = base.transformer.h[0].mlp.dense_h_to_4h.weight  # 128 x 32 in fp32: 16 KiB
    weight.data[0, 0] += 1e-3  # a sampled byte, though the file looks the same
    assert fingerprints.fingerprint_of_base(base, files) not in (first, marked)
    base.config.layer_norm_epsilon = 0.1
    assert fingerprints.fingerprint_of_base(base, []) not in (first, fingerprints.fingerprint_of_base(make_bloom(), []))


def test_model_card_holds_no_local_path_and_escapes_its_table(tmp_path):
    base = tmp_path / "secret/base"
    base.mkdir(parents=True)
    adapter = Adapter(torch.zeros(1, 4), {"base_model_name_or_path": str(base)}, {})
    texts = {"class_labels": 'say "hi"', "template": '"{q}"|\n', "prompt_tuning_init_text": "a\\"}
    places = {"dataset": str(base), "output_dir": "~/secret/run", "eval_dataset": "hub/rows"}
    card = model_card(adapter, CardFacts({**places, **texts})).decode()
    assert "secret" not in card and "the rows of `base`" in card
    assert '| class_labels | say "hi" |' in card and '| template | "{q}"\\|\\n |' in card
    assert "| prompt_tuning_init_text | a\\\\ |" in card
    assert "secret" not in plain_model_card(str(base), adapter, ["<a>"], None, "float32").decode()
