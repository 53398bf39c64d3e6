"""Runs with --streaming: a run that goes on is the run that was not interrupted, on whatever holds the rows, and what is
wrong in the middle of a stream costs nothing."""

import json
import shutil
import sys
from pathlib import Path

import datasets
import pytest
import torch
from helpers.distributed import finished, torchrun
from helpers.programs import refused
from helpers.short_runs import interrupted, outcome
from safetensors.torch import load_file

import softprompt
import train
from softprompt.cli import run_command
from softprompt.data import build_data, sampler
from softprompt.data import stream_sources as sources
from softprompt.data.stream_loader import ShuffleBuffer
from softprompt.data.stream_sources import open_source
from softprompt.utils.errors import CheckpointError, ConfigError, DataError
from softprompt.utils.fingerprints import fingerprint_of_rows

ROWS = [{"instruction": f"第{i}题" * (1 + i % 3), "output": "好" if i % 2 else "坏"} for i in range(23)]


def lines(rows) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


@pytest.fixture
def settings(tiny_base, tmp_path, monkeypatch):
    """A run of 13 steps over 19 rows in windows of 4, so that epochs end with a short window, in the folder `run`; two
    of the rows are looked at beforehand."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build_data, "ROWS_CHECKED_FIRST", 2)
    Path("rows.jsonl").write_text(lines(ROWS))
    return {
        **{"model_name_or_path": str(tiny_base), "dataset": "rows.jsonl", "eval_rows": 4, "output_dir": "run"},
        **{"max_steps": 13, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 3},
        **{"save_steps": 2, "eval_steps": 5, "tokens_per_microbatch": 30, "streaming": True, "buffer_size": 7},
    }


def test_the_file_s_order_is_the_in_memory_run_of_that_order(settings, monkeypatch):
    monkeypatch.setattr(sampler, "epoch_order", lambda n, seed, epoch: torch.arange(n))
    # Of a stream's rows, only the first ones can be compared with those held out, so none is among the training rows.
    Path("held.jsonl").write_text(lines({**row, "instruction": f"{row['instruction']}？"} for row in ROWS[:4]))
    settings |= {"eval_rows": 0, "eval_dataset": "held.jsonl", "max_length": 20}  # some rows are cut
    softprompt.train(**settings | {"streaming": False, "buffer_size": 10_000})
    (prompt, records, results), epochs = outcome(), {"epoch": 0}
    shutil.rmtree("run")
    softprompt.train(**settings | {"buffer_size": 1})
    streamed = outcome()
    assert streamed[0] == prompt and streamed[2] | epochs == results | epochs
    assert [r | epochs for r in streamed[1]] == [r | epochs for r in records]


def test_held_out_rows_are_the_first(settings, capsys):
    run = softprompt.train(**settings)
    assert len(run.evaluator.examples) == 4
    alone = {"eval_rows": 0, "eval_dataset": "held.jsonl", "dataset": "rest.jsonl", "output_dir": "other"}
    Path("held.jsonl").write_text(lines(ROWS[:4]))
    Path("rest.jsonl").write_text(lines(ROWS[4:]))
    softprompt.train(**settings | alone)
    assert outcome() == outcome("other")
    told = capsys.readouterr().out
    assert "Dataset rows.jsonl: 19 rows, columns instruction, input, output" in told
    assert "shuffle buffer 7" in told and "First rows: 2 rows" in told


@pytest.mark.parametrize("engine", ["packed", "padded"])
def test_killed_and_resumed_is_the_same_run(engine, settings):
    if engine == "padded":
        del settings["tokens_per_microbatch"]
    settings |= {"engine": engine, "max_length": 22}
    softprompt.train(**settings)
    expected = outcome()
    for at in (1, 4, 5, 8, 12) if engine == "packed" else (5, 12):
        shutil.rmtree("run")
        interrupted(settings | {"save_steps": 3}, at)
        softprompt.train(**settings, resume_from_checkpoint="newest")
        assert outcome() == expected


def parquet(rows, path, group=5):
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)


def sharded(folder):
    folder.mkdir()
    (folder / "a.jsonl").write_text("\n\n" + lines(ROWS[:9]) + "\n")
    parquet(ROWS[9:17], folder / "b.parquet")
    (folder / "c.jsonl").write_text(lines(ROWS[17:]))


PLACES = {
    "rows.parquet": lambda path: parquet(ROWS, path),
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path),
    "shards": sharded,
}


@pytest.mark.parametrize("name", PLACES)
def test_other_places_of_the_same_rows(name, settings, tmp_path):
    softprompt.train(**settings)
    expected = outcome()
    shutil.rmtree("run")
    PLACES[name](tmp_path / name)
    interrupted(settings | {"dataset": name}, 7)
    softprompt.train(**settings | {"dataset": name}, resume_from_checkpoint="newest")
    assert outcome() == expected
    source = open_source(name, None, "train")
    for first in range(24):
        read = [sources.parse_row(raw)[1] for raw in source.read(first)]
        assert read == ROWS[first:]


def test_a_folder_of_files_is_read_whole_too(tmp_path):
    from softprompt.data.dataset import load_rows
    from softprompt.data.template import Template

    sharded(tmp_path / "shards")
    assert [row["instruction"] for row in load_rows(str(tmp_path / "shards"), Template(), {})] == [
        row["instruction"] for row in ROWS
    ]
    with open(tmp_path / "shards" / "c.jsonl", "a") as file:
        file.write("\n{}")
    with pytest.raises(DataError, match=r"shards, c.jsonl, line 7: column 'instruction' must be a text"):
        load_rows(str(tmp_path / "shards"), Template(), {})


@pytest.fixture
def hub(settings, monkeypatch):
    """The rows in two files under a hub id; nobody says how many there are."""
    Path("hub").mkdir()
    Path("hub/a.jsonl").write_text(lines(ROWS[:9]))
    Path("hub/b.jsonl").write_text(lines(ROWS[9:]))
    load, folder = datasets.load_dataset_builder, str(Path("hub").resolve())
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, config=None: load(folder, config))
    monkeypatch.setattr(softprompt.utils.hub, "check_reachable", lambda: None)
    return settings | {"dataset": "some/rows"}


def test_a_hub_dataset_whose_length_nobody_knows(hub, settings, capsys):
    softprompt.train(**settings)
    prompt, records, _ = outcome()
    for at in (3, 7, 12):
        shutil.rmtree("run")
        interrupted(hub, at)
        softprompt.train(**hub, resume_from_checkpoint="newest")
        assert outcome()[0] == prompt
        epochs = [int(record["epoch"]) for record in outcome()[1]]
        assert epochs == [int(record["epoch"]) for record in records]
    assert "Dataset some/rows: rows, columns instruction" in capsys.readouterr().out
    shutil.rmtree("run")
    with pytest.raises(ConfigError, match=r"--max_steps is missing: the number of rows of some/rows is unknown"):
        softprompt.train(**hub | {"max_steps": -1})
    assert not Path("run").exists()


def test_epochs_end_where_the_rows_do(settings, capsys):
    """Six of 19 rows lose their answer, so two passes are fewer steps than were counted."""
    settings |= {"max_length": 26, "max_steps": -1, "num_train_epochs": 2.0, "save_steps": 100}
    softprompt.train(**settings)
    told = capsys.readouterr()
    assert "10 optimizer steps of 4 rows" in told.out
    expected = outcome()
    read = "Training: 38 rows were read; 12 rows cut at max_length; 12 rows left out"
    assert read in told.err and "; they ended after step 8 of 10" in told.err
    assert json.loads(Path("run/report.json").read_text())["ended_early"] == "no_more_rows"
    assert expected[1][-1]["epoch"] == 2 and expected[1][-1]["step"] == 8 and Path("run/checkpoint-8").is_dir()
    softprompt.train(**settings, resume_from_checkpoint="newest")
    assert "resuming after step 8 of 10; all of them are done" in capsys.readouterr().out
    assert outcome() == expected


def test_half_an_epoch(settings):
    softprompt.train(**settings | {"max_steps": -1, "num_train_epochs": 0.5})
    assert outcome()[1][-1]["step"] == 3


def test_half_an_epoch_of_rows_of_which_some_fall_out(settings):
    """A pass is four steps, where five were counted."""
    softprompt.train(**settings | {"max_length": 26, "max_steps": -1, "num_train_epochs": 1.5})
    last = outcome()[1][-1]
    assert last["step"] in (6, 7) and 1.5 <= last["epoch"] < 1.75


def test_a_dry_run_writes_nothing(settings, capsys):
    from softprompt.config.loader import train_config
    from softprompt.training.dry_run import dry_run

    told = dry_run(train_config(**settings | {"max_steps": -1, "num_train_epochs": 3.0}))
    assert "rows        19, the first 2 with " in told and "steps       15 of 4 rows" in told
    assert sorted(path.name for path in Path().iterdir()) == ["rows.jsonl"]


def broken(at, line) -> str:
    return lines(ROWS[:at]) + "\n" + line + "\n" + lines(ROWS[at + 1 :])


BROKEN = {
    "not JSON": ('{"instruction": "a', "rows.jsonl, line 21: not JSON"),
    "no answer": ('{"instruction": "a"}', "rows.jsonl, line 21: column 'output' must be a text, but there is none"),
    "a list": ("[]", "rows.jsonl, line 21: expected an object of columns, found a list"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_row_in_the_middle_costs_nothing(case, settings, capsys, monkeypatch):
    line, message = BROKEN[case]
    order = list(ShuffleBuffer(7, 42, 0).through(iter(range(19))))
    expected = order.index(20 - 4) // 4  # whole windows before that row
    Path("rows.jsonl").write_text(broken(20, line))
    argv = [f"--{name}={value}" for name, value in settings.items() if name != "streaming"]
    monkeypatch.setattr(sys, "argv", ["train.py", "--streaming", *argv])
    with pytest.raises(SystemExit) as ended:
        run_command(train.main)
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2 and told.startswith(f"error: {message}")
    assert expected > 0 and f" run/checkpoint-{expected} " in told and "--resume_from_checkpoint run" in told
    Path("rows.jsonl").write_text(lines(ROWS))
    if case == "not JSON":
        with pytest.raises(CheckpointError, match="the dataset named now differs"):
            softprompt.train(resume_from_checkpoint="run")
        softprompt.train(resume_from_checkpoint="run", ignore_data_skip=True)
        mended = outcome()
        shutil.rmtree("run")
        softprompt.train(**settings)
        assert outcome() == mended


def test_a_row_that_the_chat_template_refuses_is_named(settings, tiny_base, tmp_path, tokenizer):
    shutil.copytree(tiny_base, "chatty")
    tokenizer = type(tokenizer).from_pretrained("chatty")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if '13' in m.content %}{{ raise_exception('unlucky') }}{% endif %}{{ m.content }}"
        "{% endfor %}"
    )
    tokenizer.save_pretrained("chatty")
    with pytest.raises(DataError, match=r"rows.jsonl, line 14: the tokenizer's chat template refuses a row: unlucky"):
        del settings["eval_steps"]
        softprompt.train(**settings | {"model_name_or_path": "chatty", "template": "chat", "eval_rows": 0})


def test_another_content_or_kind_of_order_is_refused(settings):
    interrupted(settings, 5)
    Path("rows.jsonl").touch()
    softprompt.train(resume_from_checkpoint="run", max_steps=5)
    with pytest.raises(CheckpointError, match=r"was trained with --streaming, .*leave out --streaming false"):
        softprompt.train(**settings | {"streaming": False, "buffer_size": 10_000}, resume_from_checkpoint="newest")
    wider = settings | {"buffer_size": settings["buffer_size"] + 1}
    with pytest.raises(CheckpointError, match=r"with --buffer_size 7 .*add --ignore_data_skip"):
        softprompt.train(**wider, resume_from_checkpoint="newest")
    shutil.copytree("run", "other")
    wider |= {"output_dir": "other"}
    softprompt.train(
        resume_from_checkpoint="other", output_dir="other", max_steps=7
    )  # two windows into the second pass
    again = softprompt.train(**wider | {"max_steps": 9}, resume_from_checkpoint="newest", ignore_data_skip=True)
    assert again.metrics["epoch"] == pytest.approx(1 + 8 / 19, abs=0.1)  # and two from its beginning
    with pytest.raises(CheckpointError, match="the dataset and the held-out rows named now differ"):
        softprompt.train(**settings | {"eval_rows": settings["eval_rows"] + 1}, resume_from_checkpoint="newest")
    Path("rows.jsonl").write_text(lines(ROWS[:-1]))
    with pytest.raises(CheckpointError, match="the dataset named now differs in content"):
        softprompt.train(**settings, resume_from_checkpoint="newest")
    shutil.rmtree("run")
    interrupted(settings | {"streaming": False, "buffer_size": 10_000}, 5)
    with pytest.raises(CheckpointError, match=r"was trained without --streaming, .*leave out --streaming"):
        softprompt.train(**settings, resume_from_checkpoint="newest")
    softprompt.train(**settings, resume_from_checkpoint="newest", ignore_data_skip=True)


# ruff: noqa: E501 (a table reads best with a case a line)
REFUSED = {
    "empty": ("rows.jsonl", "", [], "rows.jsonl is empty"),
    "blank": ("rows.jsonl", "\n \n", [], "rows.jsonl is empty"),
    "missing": ("other.jsonl", lines(ROWS), [], "rows.jsonl: no such file"),
    "broken at the start": ("rows.jsonl", broken(1, "hello"), [], "rows.jsonl, line 2: not JSON"),
    "too few for the held-out": ("rows.jsonl", lines(ROWS), ["--eval_rows", "23"], "--eval_rows 23 leaves none of the 23"),
    "csv": ("rows.csv", "a,b", ["--dataset", "rows.csv"], "--streaming reads .jsonl and .parquet files, .* rows.csv is"),
    "mini": ("rows.jsonl", "", ["--dataset", "mini:reply"], "--streaming: mini:reply is generated in memory"),
    "buffer of none": ("rows.jsonl", lines(ROWS), ["--buffer_size", "0"], r"--buffer_size 0 must lie in \[1, 1,000"),
    "buffer unused": ("rows.jsonl", lines(ROWS), ["--streaming", "false", "--buffer_size", "9"], "only used with --streaming"),
    "too short": ("rows.jsonl", lines(ROWS), ["--max_length", "3"], "no row keeps a target at --max_length 3"),
    "column": ("rows.jsonl", lines(ROWS), ["--columns", "output=answer"], "--columns maps output to 'answer'"),
    "no parquet": ("rows.parquet", "hello", ["--dataset", "rows.parquet"], "rows.parquet: not a parquet file"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(case, tiny_base, tmp_path, capsys, monkeypatch):
    name, content, more, message = REFUSED[case]
    (tmp_path / name).write_text(content)
    argv = ["--streaming", "--model_name_or_path", tiny_base, "--dataset", "rows.jsonl", *more]
    with pytest.raises(DataError, match=message):
        raise DataError(refused(train, argv, capsys, monkeypatch, tmp_path))


def test_a_large_file_is_hashed_once(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text(lines(ROWS))
    plain = open_source(str(path), None, "train")
    monkeypatch.setattr(sources, "CACHED_FROM", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = open_source(str(path), None, "train")
    assert (source.rows, source.fingerprint) == (23, plain.fingerprint)
    (cached,) = (tmp_path / "cache/softprompt/fingerprints").iterdir()
    cached.write_text(f"{'0' * 64} 23")  # a file that was hashed again would not have this hash
    marked = open_source(str(path), None, "train")
    assert marked.rows == 23 and marked.fingerprint != plain.fingerprint
    path.write_text(lines(ROWS[::-1]))
    assert open_source(str(path), None, "train").fingerprint not in (plain.fingerprint, marked.fingerprint)
    assert fingerprint_of_rows(ROWS) != plain.fingerprint


@pytest.mark.slow
def test_two_ranks_meet_a_broken_row(settings, tmp_path):
    rows = ROWS * 50
    Path("rows.jsonl").write_text(f"{lines(rows[:1120])}\n[]\n{lines(rows[1121:])}")
    flags = settings | {"dataset": tmp_path / "rows.jsonl", "output_dir": tmp_path / "two", "streaming": "true"}
    flags |= {"per_device_train_batch_size": 64, "tokens_per_microbatch": 4000}
    _, err = finished(torchrun(2, "train.py", *[f"--{name}={value}" for name, value in flags.items()]), 1)
    assert err.count("error: ") == 1 and "rows.jsonl, line 1121: expected an object of columns" in err
    order = list(ShuffleBuffer(7, 42, 0).through(iter(range(1146))))
    step = order.index(1120 - 4) // 256  # whole steps before that row
    assert step == 4 and f"two/checkpoint-{step} " in err, err
    assert "exitcode  : 2" in err, err


@pytest.mark.slow
def test_ranks_read_the_same_stream(settings, tmp_path):
    """Two ranks; one alone that goes on where they were after six steps; one alone from the start."""
    softprompt.train(**settings | {"per_device_train_batch_size": 4})
    flags = settings | {"output_dir": tmp_path / "two", "dataset": tmp_path / "rows.jsonl", "streaming": "true"}
    finished(torchrun(2, "train.py", *[f"--{name}={value}" for name, value in flags.items()]))
    made = [prompt_in("two"), prompt_in("run")]
    for later in (8, 10, 12, 13):
        shutil.rmtree(f"two/checkpoint-{later}")
    softprompt.train(resume_from_checkpoint="two")
    for other in (made[0], prompt_in("two")):
        assert (other - made[1]).norm() < 1e-5 * made[1].norm()


def prompt_in(folder):
    return load_file(Path(folder, "adapter_model.safetensors"))["prompt_embeddings"]
