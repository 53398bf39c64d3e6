"""`--shard_base`: the same run, by ranks of which none holds the base, and of which one may die on the way; that the
ranks' results are one process's is in tests/distributed/test_process_group.py. Here is what is read, held, and
refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import watched
from helpers.bases import make_bloom, write_deep_bloom
from helpers.distributed import ROOT, RUN, Ranks, finished, metrics_in, pid_of, ranks_of, torchrun, wait_for
from helpers.programs import refused
from helpers.short_runs import outcome
from helpers.small_bases import small_base
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import softprompt
import train
from softprompt.config.loader import train_config
from softprompt.distributed.process_group import World
from softprompt.mini import BASE_DIR
from softprompt.training.load_run import load_run
from softprompt.utils.errors import ModelError
from softprompt.utils.safetensors_io import list_stored_tensors

ROW = '{"instruction": "a", "output": "b"}\n'


def prompt_in(folder):
    return load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]


def relative(mine, theirs):
    return ((mine - theirs).norm() / theirs.norm()).item()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process with the whole base: steps of as many rows."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    train.main([*RUN, "--per_device_train_batch_size", "8", "--output_dir", str(folder)])
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A small llama with the embedded base's tokenizer; the sizes of its slices differ between ranks."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    sizes = {"vocab_size": len(tokenizer), "num_hidden_layers": 3, "intermediate_size": 63}
    small_base("llama", **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


SHARED = [*RUN, "--per_device_train_batch_size", 4, "--shard_base"]


def killed(engine, folder, *flags):
    """Two ranks, one of which is killed on the way; what they had said when the other one had ended, and how long that
    took."""
    flags = [*SHARED, "--engine", engine, *flags, "--output_dir", folder]
    with Ranks(2, watched.trains_here, folder.parent / "told", *flags) as ranks:
        wait_for(folder / "checkpoint-16", ranks)
        pid, began = ranks.processes[1].pid, time.monotonic()
        os.kill(pid, signal.SIGKILL)
        out, err = ranks.communicate()
    assert ranks.processes[0].exitcode == 1 and f"error: rank 0: rank 1 (process {pid}) died" in err
    return out, time.monotonic() - began


def same_run(folder, alone, near=1e-5):
    """`near` is of losses; norms of gradients that are almost nothing differ by more."""
    assert relative(prompt_in(folder), prompt_in(alone)) < 1e-5
    tolerances = {"loss": near, "eval_loss": near, "eval_perplexity": near, "grad_norm": 100 * near}
    for mine, theirs in zip(metrics_in(folder), metrics_in(alone), strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - {"tokens_per_second"}:
            assert mine[name] == pytest.approx(theirs[name], rel=tolerances.get(name, 0)), name


def test_a_rank_dies_while_the_other_waits_for_its_blocks(alone, tmp_path, monkeypatch):
    """And what they had saved is one process's, which goes on with the whole base."""
    out, seconds = killed("packed", tmp_path / "run")
    assert "packed engine, 1,024 tokens at a time, layer by layer, 2 processes" in out and seconds < 150
    assert "packed engine: checked against the padded one" in out
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    train.main(["--resume_from_checkpoint", str(tmp_path / "run"), "--shard_base", "false"])
    same_run(tmp_path / "run", alone)


def test_a_decoder_is_checked_on_all_ranks_and_goes_on_unsharded(llama, tmp_path):
    """The first steps are those of two ranks, the others those of one process."""
    rows = [{"instruction": "a" * (1 + i % 7), "output": "b" * (1 + i % 3)} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags, folder = (
        ["--dataset", str(tmp_path / "rows.jsonl"), "--eval_rows", "3", "--logging_steps", "1"],
        tmp_path / "run",
    )
    flags += [
        "--max_steps",
        "4",
        "--save_steps",
        "2",
        "--model_name_or_path",
        str(llama),
        "--learning_rate",
        "0.1",
        "--engine",
        "packed",
    ]
    train.main([*flags, "--per_device_train_batch_size", "8", "--output_dir", str(tmp_path / "alone")])
    mine = [*flags, "--per_device_train_batch_size", 4, "--shard_base", "--output_dir", folder]
    out, _ = ranks_of(2, watched.trains_here, tmp_path / "told", *mine)
    assert "packed engine: checked against the padded one on 4 rows" in out and "2 processes" in out
    same_run(folder, tmp_path / "alone", 1e-5)
    shutil.rmtree(folder / "checkpoint-4")
    train.main(["--resume_from_checkpoint", str(folder / "checkpoint-2"), "--shard_base", "false"])
    assert relative(prompt_in(folder), prompt_in(tmp_path / "alone")) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["packed", "padded"])
def test_a_rank_of_a_sharded_decoder_dies(engine, llama, tmp_path):
    out, seconds = killed(engine, tmp_path / "run", "--model_name_or_path", llama)
    assert f"{engine} engine" in out and seconds < 150


@pytest.mark.slow
def test_a_base_whose_packed_forward_breaks_off_is_padded(tmp_path):
    """stablelm does not pass the rows on to its attention, so the packed engine fails within the first layer."""
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    small_base("stablelm", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    flags = [*RUN, "--max_steps", 3, "--model_name_or_path", tmp_path / "base"]
    mine = [*flags, "--per_device_train_batch_size", 4, "--shard_base", "--output_dir", tmp_path / "run"]
    out, _ = finished(torchrun(2, "train.py", *mine))
    assert "padded engine, because the packed one fails its check: it cannot run this base" in out
    one = [*map(str, flags), "--per_device_train_batch_size", "8", "--output_dir", str(tmp_path / "one")]
    train.main(one)
    same_run(tmp_path / "run", tmp_path / "one", 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["packed", "padded"])
def test_a_rank_dies_and_the_ranks_go_on_by_themselves(engine, alone, tmp_path):
    command = ["train.py", *SHARED, "--engine", engine, "--output_dir", tmp_path / "run"]
    launcher = torchrun(2, "--max-restarts", 1, "--monitor-interval", 3, *command)
    wait_for(tmp_path / "run" / "checkpoint-16", launcher)
    os.kill(pid_of(launcher, 1), signal.SIGKILL)
    out, _ = finished(launcher)
    assert "resuming after step" in out and f"{engine} engine" in out
    same_run(tmp_path / "run", alone, 1e-5 if engine == "packed" else 1e-3)  # the other one is another engine's


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_another_number_of_ranks_goes_on(ranks, alone, tmp_path):
    first, folder = tmp_path / "first", tmp_path / "second"
    command = ["train.py", *RUN, "--per_device_train_batch_size", 4, "--shard_base", "--output_dir", first]
    finished(torchrun(2, *command, "--max_steps", 24, "--lr_scheduler_type", "constant"))
    again = ["--resume_from_checkpoint", first, "--output_dir", folder, "--max_steps", 40]
    if ranks == 1:
        flags = [sys.executable, "train.py", *map(str, again), "--shard_base", "false"]
        subprocess.run(flags, cwd=ROOT, check=True, capture_output=True)
    else:
        finished(torchrun(ranks, "train.py", *again))
    whole = tmp_path / "whole"
    flags = [*RUN, "--per_device_train_batch_size", "8", "--lr_scheduler_type", "constant"]
    train.main([*flags, "--output_dir", str(whole)])
    assert relative(prompt_in(folder), prompt_in(whole)) < 1e-5


@pytest.mark.slow
def test_ranks_look_for_a_learning_rate_together(tmp_path):
    """Over a base that they share out, and find what one process finds."""
    flags, one, two = [*RUN, "--find_learning_rate", "--max_steps", "8"], tmp_path / "one", tmp_path / "two"
    train.main([*flags, "--per_device_train_batch_size", "8", "--output_dir", str(one)])
    shared = [*flags, "--per_device_train_batch_size", 4, "--shard_base", "--output_dir", two]
    out, _ = finished(torchrun(2, "train.py", *shared))
    assert "learning rate to be found" in out
    found, alone = metrics_in(two)[0], metrics_in(one)[0]
    assert found["learning_rate"] == alone["learning_rate"]
    assert found["sweep"] == pytest.approx(alone["sweep"], rel=1e-3)
    assert relative(prompt_in(two), prompt_in(one)) < 1e-4


@pytest.mark.slow
def test_dry_run_counts_what_a_rank_holds(tmp_path):
    out, _ = finished(torchrun(2, "train.py", *RUN, "--shard_base", "--dry_run", "--print_model"))
    assert "Dry run" in out and "FSDPBloomBlock" in out and "trainable params: 1,280 || all params: 1,2" in out


MEASURED = """
import sys, threading, time
from pathlib import Path
import os, torch.distributed.fsdp, train, softprompt.training.run
from softprompt.cli import run_command

def now():
    return next(int(x.split()[1]) << 10 for x in open("/proc/self/status") if x.startswith("RssAnon"))

began, peak = now(), 0

def watch():
    global peak
    while True:
        peak = max(peak, now())
        time.sleep(0.003)

threading.Thread(target=watch, daemon=True).start()
try:
    run_command(train.main)
finally:
    Path(f"peak-{os.environ.get('RANK', 'alone')}").write_text(str(peak - began))
"""


def write_deep_llama(folder):
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 8}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).bfloat16().save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind, engine", [("bloom", "packed"), ("llama", "packed"), ("llama", "padded")])
def test_no_rank_holds_the_base(kind, engine, tokenizer, tmp_path):
    """Of 302 MB in layers each of two ranks has half, and two or three layers of 12.6 MB (or 16.8 MB) on their way. The
    files have bf16, half of that: fp32 could stay mapped, and the ranks of a machine share what is mapped."""
    base = tmp_path / "base"
    if kind == "bloom":
        write_deep_bloom(base, H=512, L=24, N=8, dtype=torch.bfloat16)
    else:
        write_deep_llama(base)
    tokenizer.save_pretrained(base)
    (tmp_path / "rows.jsonl").write_text(ROW * 8)
    (tmp_path / "measured.py").write_text(MEASURED)
    flags = ["--model_name_or_path=base", "--dataset=rows.jsonl", "--max_steps=1", "--overwrite_cache"]
    flags.append(f"--engine={engine}")
    environment = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    options = {"cwd": tmp_path, "env": {**os.environ, **environment, "XDG_CACHE_HOME": str(tmp_path / "cache")}}
    finished(torchrun(2, "measured.py", *flags, "--output_dir=shards", "--shard_base", **options))
    subprocess.run([sys.executable, "measured.py", *flags, "--output_dir=whole"], check=True, **options)
    held = {name: int((tmp_path / f"peak-{name}").read_text()) for name in ("alone", "0", "1")}
    size = 2 * sum(path.stat().st_size for path in base.glob("*.safetensors"))
    print(f"a base of {size / 1e6:.0f} MB: anonymous memory rises by at most {held}")
    assert max(held["0"], held["1"]) < held["alone"] - 0.3 * size
    mine, theirs = (metrics_in(tmp_path / name)[0] for name in ("shards", "whole"))
    assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)


@pytest.fixture
def first_of_two(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    return World(0, 2)


@pytest.mark.parametrize("case", ["gpt2", "bin", "shard"])
def test_files_that_cannot_be_shared_out(case, first_of_two, tiny_base, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    (tmp_path / "rows.jsonl").write_text(ROW)
    if case == "gpt2":
        (base / "config.json").write_text('{"model_type": "gpt2"}')
        said = r"model.safetensors: tensor transformer.ln_f.bias has the shape \[32\], but config.json requires"
    elif case == "bin":
        (base / "model.safetensors").rename(base / "pytorch_model.bin")
        said = "base: holds neither .*, only pytorch_model.bin; .*; --shard_base reads safetensors"
    else:
        (base / "model.safetensors").unlink()
        make_bloom().save_pretrained(base, max_shard_size="60KB")
        missing = sorted(base.glob("model-*"))[1]
        missing.unlink()
        said = f"base/{missing.name}: missing, though model.safetensors.index.json names it"
    named = {"model_name_or_path": str(base), "dataset": str(tmp_path / "rows.jsonl")}
    config = train_config(**named, shard_base=True, output_dir=str(tmp_path / "run"))
    with pytest.raises(ModelError, match=said):
        load_run(config, first_of_two)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, said",
    [
        (
            ["--shard_base"],
            "--shard_base shards a base among several processes, and there is only one",
        ),
        (["--shard_base", "--stream_base"], "--stream_base and --shard_base exclude each other"),
    ],
)
def test_refused_in_one_line(flags, said, capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("RANK", raising=False)
    assert said in refused(train, flags, capsys, monkeypatch, tmp_path)


def test_one_process_holds_the_whole_base(run_settings, monkeypatch, capsys):
    softprompt.train(**run_settings)
    expected = outcome()
    shutil.rmtree("run")
    monkeypatch.setenv("RANK", "0")  # as torchrun --nproc_per_node=1 has it
    softprompt.train(**run_settings, shard_base=True)
    assert "there is one process, which holds the whole base" in capsys.readouterr().out
    assert outcome() == expected


def test_a_part_of_a_stored_tensor(tmp_path):
    values = torch.randn(7, 3)
    save_file({"a": values}, tmp_path / "model.safetensors")
    stored, part = list_stored_tensors(tmp_path)["a"], torch.empty(2, 3)
    stored.read_into(part, 12)
    assert torch.equal(part, values[4:6])
    stored.dtype, part = torch.bfloat16, torch.empty(3, 3)
    stored.read_into(part, 6)
    assert torch.equal(part, values[2:5].bfloat16().float())
