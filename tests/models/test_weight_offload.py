"""`--stream_base`: the same run, from files that are looked at closely, in memory that does not hold the base."""

# ruff: noqa: E501 (a table reads best with a case a line)
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.bases import make_bloom, write_deep_bloom
from helpers.programs import refused
from helpers.short_runs import interrupted, outcome
from safetensors.torch import load_file, save_file

import infer
import softprompt
import train
from softprompt.config.loader import train_config
from softprompt.distributed.process_group import World
from softprompt.models.loading import read_base
from softprompt.models.meta_loading import load_meta_model
from softprompt.training.run import set_up
from softprompt.utils.errors import ConfigError, ModelError, TrainingError
from softprompt.utils.fingerprints import fingerprint_of_base
from softprompt.utils.safetensors_io import list_stored_tensors

ROOT = Path(__file__).parents[2]


def losses(folder):
    """What a streamed run has in common with an ordinary one: prompt, and metrics without answers."""
    prompt, records, results = outcome(folder)
    plain = [{name: value for name, value in r.items() if "exact_match" not in name} for r in (*records, results)]
    return prompt, plain


def test_a_streamed_run_is_the_run(run_settings, capsys):
    run_settings |= {"engine": "packed"}  # auto depends on the time that each engine takes
    softprompt.train(**run_settings)
    expected = losses("run")
    shutil.rmtree("run")
    for bound in (1.0, 0.0):
        run = softprompt.train(**run_settings, stream_base=True, max_activation_gib=bound, offload_folder="borders")
        told = capsys.readouterr().out
        assert losses("run") == expected and run.after.answers is None
        assert (
            "packed engine, 30 tokens at a time, layer by layer" in told and "no exact match, because an answer" in told
        )
        shutil.rmtree("run")
    assert not list(Path("borders").iterdir())


@pytest.mark.parametrize("first", [True, False], ids=["streamed first", "resident first"])
def test_resumed_on_the_other_side(first, run_settings):
    run_settings |= {"engine": "packed"}
    softprompt.train(**run_settings)
    expected = losses("run")[0]
    shutil.rmtree("run")
    interrupted({**run_settings, "stream_base": first}, at=7)
    softprompt.train(**run_settings, stream_base=not first, resume_from_checkpoint="newest")
    assert losses("run")[0] == expected


def test_dry_run_and_an_answer(run_settings, tmp_path, capsys, monkeypatch):
    flags = [f"--{name}={value}" for name, value in run_settings.items()]
    train.main([*flags, "--stream_base", "--dry_run"])
    assert "the base 0.00" in capsys.readouterr().out and not Path("run").exists()
    train.main([*flags, "--stream_base"])
    assert "Try: python -m softprompt infer" in capsys.readouterr().out
    infer.main(["--adapter", "run", "--prompt", "x", "--max_new_tokens", "2"])


def fingerprints(folder):
    base, blocks = load_meta_model(str(folder))
    return fingerprint_of_base(base, [], blocks=blocks), fingerprint_of_base(read_base(str(folder)), [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_the_fingerprint_is_that_of_the_loaded_base(dtype, tied, tmp_path):
    base = make_bloom(tie_word_embeddings=tied, n_layer=3).to(dtype)
    base.save_pretrained(tmp_path, max_shard_size="40KB")
    one, other = fingerprints(tmp_path)
    assert one == other
    config = json.loads((tmp_path / "config.json").read_text())
    for named in ("float32", "bfloat16", "float16"):  # files of another dtype than the model's
        (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": named}))
        one, other = fingerprints(tmp_path)
        assert one == other


def test_a_large_base_is_recognized_by_samples(tmp_path, monkeypatch):
    from softprompt.utils import fingerprints as module

    make_bloom(hidden_size=64).save_pretrained(tmp_path)
    whole = fingerprints(tmp_path)[0]
    monkeypatch.setattr(module, "CACHED_FROM", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base, blocks = load_meta_model(str(tmp_path))
    files = [tmp_path / "model.safetensors"]
    assert fingerprint_of_base(base, files, blocks=blocks) == whole
    (cached,) = (tmp_path / "cache/softprompt/fingerprints").iterdir()
    cached.write_text(marked := "0" * 64)  # a base that was hashed again would not have this fingerprint
    assert fingerprint_of_base(base, files, blocks=blocks) == marked
    assert fingerprint_of_base(read_base(str(tmp_path)), files) == marked


def test_names_without_the_prefix(tmp_path):
    """As the hub's own BLOOMs have them."""
    make_bloom().save_pretrained(tmp_path)
    before = fingerprints(tmp_path)[0]
    path = tmp_path / "model.safetensors"
    save_file({name.removeprefix("transformer."): t for name, t in load_file(path).items()}, path, {"format": "pt"})
    assert fingerprints(tmp_path) == (before, before)


def test_a_base_from_the_hubs_cache(tiny_base, tmp_path, monkeypatch):
    from huggingface_hub import constants

    place = tmp_path / "models--someone--tiny"
    shutil.copytree(tiny_base, place / "snapshots" / "abc")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    base, blocks = load_meta_model("someone/tiny")
    assert fingerprint_of_base(base, [], blocks=blocks) == fingerprints(tiny_base)[0]


def change(path: Path, act) -> None:
    """The header of a safetensors file, changed; `act` gets it and may return another text."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    text = (act(header) or json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


NAME = "transformer.h.1.mlp.dense_h_to_4h.weight"
FAULTS = {
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:-5]), "ends at byte"),
    "empty": (lambda p: p.write_bytes(b""), "not a whole safetensors file"),
    "a long header": (lambda p: p.write_bytes(b"\xff" * 7 + b"\0" + bytes(99)), "not a whole safetensors file"),
    "no JSON": (lambda p: change(p, lambda h: "{nonsense"), "not a whole safetensors file"),
    "a list": (lambda p: change(p, lambda h: "[1]"), "not a whole safetensors file"),
    "not there": (lambda p: change(p, lambda h: h.pop(NAME) and None), f"lack the tensor {NAME}"),
    "another shape": (
        lambda p: change(p, lambda h: h[NAME].update(shape=[32, 128])),
        rf"{NAME} has the shape \[32, 128",
    ),
    "another size": (
        lambda p: change(p, lambda h: h[NAME].update(shape=[32, 12])),
        rf"tensor {NAME}: .* bytes for the",
    ),
    "negative": (
        lambda p: change(p, lambda h: h[NAME].update(shape=[-4, -4096])),
        rf"tensor {NAME}: sizes that are no",
    ),
    "a text": (lambda p: change(p, lambda h: h[NAME].update(shape=["a"])), rf"tensor {NAME}: "),
    "no offsets": (
        lambda p: change(p, lambda h: h[NAME].pop("data_offsets") and None),
        rf"{NAME}: data_offsets is miss",
    ),
    "a quantized one": (
        lambda p: change(p, lambda h: h[NAME].update(dtype="I8", shape=[128, 128])),
        rf"{NAME} has the dtype torch.int8, but the model requires torch.float32",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_are_not_what_they_should_be(fault, tmp_path):
    make_bloom().save_pretrained(tmp_path)
    spoil, said = FAULTS[fault]
    spoil(tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=said) as raised:
        load_meta_model(str(tmp_path))
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../b.safetensors"}}'])
def test_an_index_that_is_none(text, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"index.json: not an index of safetensors files \("):
        list_stored_tensors(tmp_path)


def test_a_file_that_is_cut_while_it_is_read(tmp_path):
    from softprompt.models.loading import freeze
    from softprompt.models.weight_offload import StreamedWeights

    make_bloom(n_layer=4).save_pretrained(tmp_path)
    base, blocks = load_meta_model(str(tmp_path))
    weights = StreamedWeights(freeze(base, torch.float32), blocks, torch.float32)
    whole = (tmp_path / "model.safetensors").read_bytes()
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.truncate(1000)
        with pytest.raises(TrainingError, match=r"model.safetensors has become shorter"):
            list(weights.iter_layers(range(4)))
        file.write(whole)
    assert len(list(weights.iter_layers(range(4)))) == 4  # what could not be read is not taken for read


@pytest.mark.parametrize("case", ["gpt2", "bin", "shard", "padded", "folder", "bound"])
def test_refused_in_one_line(case, tiny_base, tmp_path, capsys, monkeypatch):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}')
    flags, said = ["--stream_base"], ""
    if case == "gpt2":
        (base / "config.json").write_text('{"model_type": "gpt2"}')
        said = "--stream_base is for BLOOM, and base is of type gpt2; leave it out"
    elif case == "bin":
        (base / "model.safetensors").rename(base / "pytorch_model.bin")
        said = "base: holds neither model.safetensors nor model.safetensors.index.json, only pytorch_model.bin; load it"
    elif case == "shard":
        (base / "model.safetensors").unlink()
        make_bloom().save_pretrained(base, max_shard_size="60KB")
        missing = sorted(base.glob("model-*"))[1]
        missing.unlink()
        said = f"base/{missing.name}: missing, though model.safetensors.index.json names it"
    elif case == "padded":
        flags += ["--engine", "padded"]
        said = "--stream_base is for the packed engine; leave --engine padded out"
    elif case == "folder":
        flags = ["--offload_folder", "x"]
        said = (
            "--offload_folder is only used with --stream_base, --shard_base, --load_in_8bit or --load_in_4bit; add one"
        )
    else:
        flags += ["--max_activation_gib", "-1"]
        said = "--max_activation_gib -1.0 must not be negative"
    capsys.readouterr()
    where = ["--model_name_or_path", "base", "--dataset", "rows.jsonl", "--output_dir", "run"]
    assert said in refused(train, [*where, *flags], capsys, monkeypatch, tmp_path)


def test_a_full_disk_ends_the_run_in_one_line(tiny_base, tmp_path):
    """No file may be larger than 3,000 bytes."""
    code = "import resource, sys, train; from softprompt.cli import run_command; "
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)); run_command(train.main)"
    (tmp_path / "rows.jsonl").write_text('{"instruction": "aaaaaaaaaaaa", "output": "bbbbbbbbbbbb"}\n' * 9)
    flags = [f"--model_name_or_path={tiny_base}", "--dataset=rows.jsonl", "--output_dir=run", "--overwrite_cache"]
    ended = subprocess.run(
        [sys.executable, "-c", code, *flags, "--stream_base", "--max_activation_gib=0", "--offload_folder=borders"],
        cwd=tmp_path, capture_output=True, text=True, env=environment(tmp_path), timeout=300,
    )  # fmt: skip
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error")]
    assert ended.returncode == 1 and "--offload_folder borders: activations cannot be stored (File too large)" in line
    assert "Traceback" not in ended.stderr


def environment(tmp_path):
    import os

    paths = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    return {**os.environ, **paths, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}


LIMITED = """
import resource, sys, threading, time
import torch, train
from softprompt.cli import run_command

def of(field):
    return next(int(x.split()[1]) << 10 for x in open("/proc/self/status") if x.startswith(field + ":"))

limit, peak = int(sys.argv.pop(1)), 0
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

def watch():
    global peak
    while True:
        peak = max(peak, of("RssAnon"))
        time.sleep(0.005)

threading.Thread(target=watch, daemon=True).start()
try:
    run_command(train.main)
finally:
    print("PEAK", peak)
"""


def test_a_base_larger_than_memory(tokenizer, tmp_path):
    """A base of 756 MB under a limit of 630 MB for all data of the process; the ordinary run does not fit."""
    base = tmp_path / "base"
    write_deep_bloom(base)
    tokenizer.save_pretrained(base)
    size, limit = sum(path.stat().st_size for path in base.glob("*.safetensors")), 630_000_000
    assert size > 1.15 * limit
    (tmp_path / "rows.jsonl").write_text('{"instruction": "你好", "output": "好"}\n' * 6)
    flags = ["--model_name_or_path=base", "--dataset=rows.jsonl", "--max_steps=1", "--overwrite_cache"]
    ends = {}
    for streamed in ("true", "false"):
        ends[streamed] = subprocess.run(
            [sys.executable, "-c", LIMITED, str(limit), *flags, f"--output_dir={streamed}", f"--stream_base={streamed}"],
            cwd=tmp_path, capture_output=True, text=True, env=environment(tmp_path), timeout=300,
        )  # fmt: skip
    told = ends["true"].stdout
    assert ends["true"].returncode == 0, ends["true"].stderr
    peak = int(told.split("PEAK")[1])
    print(f"a base of {size / 1e6:.0f} MB, RLIMIT_DATA {limit / 1e6:.0f} MB: RssAnon at most {peak / 1e6:.0f} MB")
    assert peak < limit and (tmp_path / "true" / "adapter_model.safetensors").exists()
    assert ends["false"].returncode != 0, "the limit does not hold the ordinary run back"


def test_an_offload_folder_that_is_a_file_is_refused_at_once(tmp_path):
    (tmp_path / "file").touch()
    config = train_config(
        "mini", stream_base=True, offload_folder=str(tmp_path / "file"), output_dir=str(tmp_path / "r")
    )
    with pytest.raises(ConfigError, match=r"--offload_folder .*file: is not a folder; name a folder"):
        set_up(config, World())
