"""Which rows are taken: splits of files, folders, DatasetDicts and hub datasets, slices of them, and held-out rows that
are never training rows."""

import json
import sys
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict

import infer
import softprompt
from softprompt.cli import run_command
from softprompt.config.loader import train_config
from softprompt.data.build_data import read_rows
from softprompt.data.dataset import load_rows
from softprompt.data.splits import choose, find_splits
from softprompt.data.stream_sources import open_source, parse_row
from softprompt.data.template import Template
from softprompt.distributed.process_group import process_group
from softprompt.training.run import set_up
from softprompt.utils.errors import ConfigError, DataError


def rows(name: str, n: int) -> list[dict[str, str]]:
    return [{"instruction": f"{name} {i}", "input": "", "output": "好" if i % 2 else "坏"} for i in range(n)]


def write(path: Path, some: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        Dataset.from_list(some).to_parquet(path)
    elif path.suffix == ".csv":
        lines = [",".join(row.values()) for row in some]
        path.write_text("\n".join([",".join(some[0]), *lines]), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(some, ensure_ascii=False), encoding="utf-8")
    else:
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in some), encoding="utf-8")


FOLDERS = {
    "shards": {"train-00000-of-00002.parquet": "train", "train-00001-of-00002.parquet": "train", "test-00000-of-00001.parquet": "test"},
    "a hub repository": {"data/train-00000-of-00001-0a1b2c.parquet": "train", "data/validation-00000-of-00001.parquet": "validation"},
    "splits of other names": {"data/train_sft-00000-of-00001.parquet": "train_sft", "data/test_sft-00000-of-00001.parquet": "test_sft"},
    "names without a word for a split": {"en-00000-of-00001.jsonl": "en", "fr-00000-of-00001.jsonl": "fr"},
    "one split": {"train.jsonl": "train"},
    "held-out rows alone": {"dev.jsonl": "validation"},
    "words in names": {"my-train_2.jsonl": "train", "my.dev.csv": "validation", "Testing.json": "test"},
    "folders": {"train/a.jsonl": "train", "train/b.csv": "train", "eval/a.json": "test"},
    "files beside one of a split": {"rows.jsonl": "train", "rows-test.jsonl": "test"},
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_files_belong_to_the_splits_that_they_are_named_for(case, tmp_path):
    for name in FOLDERS[case]:
        write(tmp_path / name, rows(name, 3))
    (tmp_path / ".git").mkdir()
    write(tmp_path / ".git" / "test.jsonl", rows("hidden", 1))
    (tmp_path / "README.md").write_text("rows")
    write(tmp_path / "dataset_infos.json", rows("infos", 1))
    found = find_splits(str(tmp_path), None)
    assert not found.notices
    names = set(FOLDERS[case].values())
    assert found.named and set(found.parts) == names
    for split in names:
        expected = [row for name in sorted(FOLDERS[case]) if FOLDERS[case][name] == split for row in rows(name, 3)]
        assert load_rows(str(tmp_path), Template(), {}, split=split) == expected
        if all(Path(name).suffix in (".jsonl", ".parquet") for name in FOLDERS[case]):
            source = open_source(str(tmp_path), None, split)
            assert [parse_row(raw)[1] for raw in source.read(0)] == expected and source.rows == len(expected)
    for read in (
        lambda: load_rows(str(tmp_path), Template(), {}, split="no"),
        lambda: open_source(str(tmp_path), None, "no"),
    ):
        with pytest.raises(DataError, match="has no split 'no'; --dataset_split takes one of") as raised:
            read()
        assert all(name in str(raised.value) for name in names)


@pytest.mark.parametrize(
    "names", [("a.jsonl", "b.csv", "c.json", "d.parquet"), ("data/x.csv",), ("data-00000-of-00001.jsonl",)]
)
def test_a_folder_whose_files_name_no_split_is_one(names, tmp_path):
    for name in names:
        write(tmp_path / name, rows(name, 2))
    assert load_rows(str(tmp_path), Template(), {}) == [row for name in names for row in rows(name, 2)]
    with pytest.raises(DataError, match="has no splits; leave --dataset_split test out"):
        load_rows(str(tmp_path), Template(), {}, split="test")


def test_what_is_left_out_of_a_folder_is_said(tmp_path):
    for name in ("train-00001-of-00003.jsonl", "test.jsonl", "more.jsonl", "deep/rows.jsonl", "old.csv.gz"):
        write(tmp_path / name, rows(name, 2))
    missing, stray, unread, nested = find_splits(str(tmp_path), None).notices
    assert missing.startswith("warning: ") and "1 of the 3 shards of train" in missing
    assert "more.jsonl" in stray and "old.csv.gz" in unread and "deep/rows.jsonl" in nested
    config = train_config("mini", dataset=str(tmp_path), output_dir=str(tmp_path / "run"))
    found = read_rows(config, Template())
    assert list(found.notices[:4]) == [missing, stray, unread, nested] and len(found.train) == 2
    streamed = read_rows(train_config("mini", dataset=str(tmp_path), streaming=True), Template())
    assert list(streamed.notices[:4]) == [missing, stray, unread, nested]


CHOSEN = {  # of these splits, what --eval_split names, what is taken
    ("train,validation,test", None): "validation",
    ("train,test", None): "test",
    ("test,dev", None): "dev",
    ("train", None): "train",
    ("odd", None): "odd",
    ("", None): "train",
    ("", "train"): "train",
    ("train,test", "train[:3]"): "train[:3]",
    ("train,test", "train[:3]+test"): "train[:3]+test",
    ("a,b", None): "a has the splits|a, b; name the one to hold out with --eval_split",
    ("train,test", "validation"): "has no split 'validation'; --eval_split takes one of train, test",
    ("train,test", "train+dev[:3]"): "has no split 'dev'",
    ("", "test"): "has no splits; leave --eval_split test out",
}


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_the_split_to_hold_out(case):
    names, split = case
    try:
        assert choose("rows", names.split(",") if names else [], split, "--eval_split") == CHOSEN[case]
    except DataError as error:
        assert any(part in str(error) for part in CHOSEN[case].split("|"))


def save(kind: str, folder: Path, splits: dict[str, list[dict[str, str]]]) -> str:
    """As a folder of files, or as a DatasetDict."""
    if kind == "saved":
        DatasetDict({name: Dataset.from_list(some) for name, some in splits.items()}).save_to_disk(folder)
    else:
        for name, some in splits.items():
            write(folder / f"{name}-00000-of-00001.{kind}", some)
    return str(folder)


KINDS = ["saved", "jsonl", "parquet", "csv", "json"]


@pytest.mark.parametrize("kind", KINDS)
def test_slices_are_those_of_datasets(kind, tmp_path):
    train, test = rows("t", 10), rows("h", 5)
    source = save(kind, tmp_path / "d", {"train": train, "test": test})
    expected = {
        "train[:4]": train[:4],
        "train[-3:]": train[-3:],
        "train[10%:35%]": DatasetDict({"train": Dataset.from_list(train)})["train"].select(range(1, 4)).to_list(),
        "test[1:]+train[:1]": test[1:] + train[:1],
        "train+test": train + test,
    }
    for spec, some in expected.items():
        assert load_rows(source, Template(), {}, split=spec) == some, spec
        with pytest.raises(ConfigError, match="--streaming reads whole splits" if kind in KINDS[:3] else "--streaming"):
            open_source(source, None, spec)
    for spec in ("train[", "train[a:b]", "train[:200%]", "train[::2]"):
        with pytest.raises(DataError, match=r"--dataset_split .*: expected the name of a split, or slices such as"):
            load_rows(source, Template(), {}, split=spec)
    with pytest.raises(DataError, match="holds no rows"):
        load_rows(source, Template(), {}, split="train[:0]")


def read(**given):
    return read_rows(train_config("mini", max_steps=1, **given), Template())


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
@pytest.mark.parametrize("kind", KINDS[:3])
def test_held_out_rows_are_another_split(kind, streaming, tmp_path):
    splits = {name: rows(name, n) for name, n in (("train", 6), ("validation", 3), ("test", 2))}
    source = save(kind, tmp_path / "d", splits)
    how = {"dataset": source, "streaming": streaming}
    for more, name in [
        ({"eval_dataset": source}, "validation"),
        ({"eval_split": "test"}, "test"),
        ({"eval_dataset": str(tmp_path / "." / "d"), "eval_split": "test"}, "test"),
    ]:
        found = read(**how, **more)
        assert found.train == splits["train"] and found.held_out == splits[name]
        for said in ("training rows: split train of ", f"held-out rows: split {name} of "):
            assert any(said in note for note in found.notices)
    assert read(**how | {"dataset_split": "test"}, eval_split="train").held_out == splits["train"]
    link = tmp_path / "link"
    link.symlink_to(source)
    for same in ({"eval_split": "train"}, {"eval_dataset": str(link), "eval_split": "train"}):
        with pytest.raises(DataError, match="holds rows that are trained on; name another split with --eval_split"):
            read(**how, **same)
    with pytest.raises(DataError, match="has no split 'dev'; --eval_split takes one of"):
        read(**how, eval_split="dev")


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
def test_held_out_rows_are_never_the_training_rows(streaming, tmp_path):
    write(tmp_path / "f" / "a.jsonl", rows("a", 4))
    write(tmp_path / "f" / "b.jsonl", rows("b", 4))
    write(tmp_path / "copy.jsonl", rows("a", 3) + rows("c", 1))
    folder, file, copy = str(tmp_path / "f"), str(tmp_path / "f" / "a.jsonl"), str(tmp_path / "copy.jsonl")
    for dataset, held_out in [(file, file), (folder, folder), (folder, file), (file, folder)]:
        with pytest.raises(DataError, match="holds rows that are trained on"):
            read(dataset=dataset, eval_dataset=held_out, streaming=streaming)
    found = read(dataset=file, eval_dataset=copy, streaming=streaming)
    assert "warning: 3 of 4 held-out rows are among the " in "".join(found.notices)
    write(tmp_path / "twice.jsonl", rows("a", 4) + rows("a", 3) + rows("a", 2))
    found = read(dataset=str(tmp_path / "twice.jsonl"), eval_rows=2, streaming=streaming)
    assert "3 of " in found.notices[0] and "training rows repeat an earlier row" in found.notices[0]
    assert "warning: 2 of 2 held-out rows" in found.notices[1]


def test_slices_of_one_split_must_not_meet(tmp_path):
    write(tmp_path / "r.jsonl", rows("r", 10))
    source = str(tmp_path / "r.jsonl")
    found = read(dataset=source, dataset_split="train[:80%]", eval_split="train[80%:]")
    assert (found.train, found.held_out) == (rows("r", 10)[:8], rows("r", 10)[8:])
    for split in ("train[70%:]", "train[:1]", "train"):
        with pytest.raises(DataError, match="holds rows that are trained on"):
            read(dataset=source, dataset_split="train[:80%]", eval_split=split)


# ruff: noqa: E501 (a table reads best with a case a line)
REFUSED = {
    "a split of a file": ({"dataset": "r.jsonl", "dataset_split": "nonsense"}, DataError, "r.jsonl has no splits; leave --dataset_split nonsense"),
    "a split of a saved dataset": ({"dataset": "one", "dataset_split": "test"}, DataError, "one has no splits; leave --dataset_split test"),
    "a split of a file of held-out rows": ({"dataset": "r.jsonl", "eval_dataset": "h.jsonl", "eval_split": "test"}, DataError, "h.jsonl has no splits; leave --eval_split test"),
    "a split of a mini task": ({"dataset_split": "test"}, ConfigError, "--dataset_split test: mini:sentiment has no splits"),
    "another split of a mini task": ({"eval_split": "test"}, ConfigError, "--eval_split test: mini:sentiment has held-out rows of its own"),
    "two ways": ({"dataset": "r.jsonl", "eval_split": "test", "eval_rows": 3}, ConfigError, "--eval_split and --eval_rows exclude each other"),
    "a configuration of a file": ({"dataset": "r.jsonl", "dataset_config_name": "zh"}, ConfigError, "--dataset_config_name zh is for a hub dataset, which r.jsonl is not"),
    "no train split": ({"dataset": "held"}, DataError, "held has no split 'train'; --dataset_split takes one of test"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_splits_that_are_not_there_are_refused(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("r.jsonl"), rows("r", 9))
    write(Path("h.jsonl"), rows("h", 9))
    write(Path("held/test.jsonl"), rows("h", 9))
    Dataset.from_list(rows("s", 4)).save_to_disk("one")
    given, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message) as raised:
        read(**given)
    assert raised.value.exit_code == 2


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """some/rows is a hub dataset of two splits; what is downloaded of it is noted."""
    splits = {"train": rows("t", 8), "validation": rows("v", 3)}
    folder = save("jsonl", tmp_path / "hub", splits)
    loaded = []
    builder, whole = datasets.load_dataset_builder, datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, config=None: builder(folder, config))
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, config=None, **how: (loaded.append(name), whole(folder, config, **how))[1],
    )
    monkeypatch.setattr(softprompt.utils.hub, "check_reachable", lambda: None)
    return splits, loaded


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
def test_splits_of_a_hub_dataset(hub, streaming):
    splits, loaded = hub
    how = {"dataset": "some/rows", "streaming": streaming}
    for more in ({"eval_dataset": "some/rows"}, {"eval_split": "validation"}):
        found = read(**how, **more)
        assert found.train == splits["train"] and found.held_out == splits["validation"]
    for more, message in [
        ({"dataset_split": "test"}, "has no split 'test'; --dataset_split takes one of train, validation"),
        ({"eval_split": "test"}, "has no split 'test'; --eval_split takes one of train, validation"),
        ({"eval_split": "train"}, "holds rows that are trained on"),
    ]:
        with pytest.raises(DataError, match=message):
            read(**how, **more)
    assert bool(loaded) is not streaming
    if not streaming:
        assert read(**how, dataset_split="train[:50%]", eval_split="train[50%:]").held_out == splits["train"][4:]


def test_only_the_rows_that_are_looked_at_later_are_kept(tmp_path):
    write(tmp_path / "r.jsonl", rows("r", 150))
    settings = {"dataset": str(tmp_path / "r.jsonl"), "eval_rows": 10, "output_dir": str(tmp_path / "run")}
    with process_group() as world:
        data = set_up(train_config("mini", **settings), world).data
    assert data.first_rows == rows("r", 150)[:100] and len(data.train.examples) == 140


def test_infer_evaluates_on_the_split_that_is_held_out(place, capsys, monkeypatch):
    source = save("jsonl", place / "d", {"train": rows("t", 6), "test": rows("h", 4)})
    write(place / "test.jsonl", rows("h", 4))
    write(place / "train.jsonl", rows("t", 6))

    def asked(*flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["infer.py", "--adapter", "a", *flags])
        code: object = 0
        try:
            run_command(infer.main)
        except SystemExit as ended:
            code = ended.code
        return int(str(code or 0)), *capsys.readouterr()

    def figures(out: str) -> list[str]:
        """The lines of the report that do not name the dataset."""
        return [line for line in out.splitlines() if " at --max_length " not in line]

    of_file = {name: figures(asked("--eval_dataset", f"{name}.jsonl")[1]) for name in ("train", "test")}
    assert of_file["train"] != of_file["test"]
    _, out, err = asked("--eval_dataset", source)
    assert figures(out) == of_file["test"] and "held-out rows: split test of " in err
    assert figures(asked("--eval_dataset", source, "--eval_split", "train")[1]) == of_file["train"]
    for flags, message in [
        (["--eval_dataset", source, "--eval_split", "dev"], "has no split 'dev'; --eval_split takes one of"),
        (["--eval_dataset", "mini:sentiment", "--eval_split", "dev"], "--eval_split goes with an --eval_dataset"),
        (["--prompt", "x", "--eval_split", "dev"], "--eval_split goes with an --eval_dataset"),
    ]:
        code, _, err = asked(*flags)
        assert code == 2 and message in err
