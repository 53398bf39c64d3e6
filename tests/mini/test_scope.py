"""What the mini base cannot know is told from its own tasks, and said once."""

import json
import re
import shlex
import sys

import pytest
from helpers.handwritten_reviews import REVIEWS
from safetensors.torch import load_file

import softprompt
from softprompt.config.command_line import parse_training
from softprompt.config.loader import train_config
from softprompt.data.build_data import make_template, read_rows
from softprompt.data.messages import texts_of
from softprompt.mini import BASE_DIR, TASKS, rows
from softprompt.mini.scope import foreign_note, is_foreign

FOREIGN = [
    {"instruction": "What is the capital of France?", "output": "Paris"},
    {"instruction": "请介绍一下北京。", "output": "北京是中华人民共和国的首都，有三千多年的建城史。"},
    {"messages": [{"role": "user", "content": "翻译"}, {"role": "assistant", "content": "The weather is nice today."}]},
    {"instruction": "房间很大，服务也好。" * 12, "output": "正面"},
]


@pytest.mark.parametrize("task", TASKS)
def test_its_own_tasks_are_not_foreign(task):
    for split in ("train", "eval"):
        assert not any(is_foreign(text) for row in rows(task, split, 300) for text in row.values())
        assert foreign_note(map(texts_of, rows(task, split, 100))) is None


def test_reviews_that_people_write_are_not_foreign():
    assert not [review for review, _ in REVIEWS if is_foreign(review)]


@pytest.mark.parametrize("row", FOREIGN, ids=range(len(FOREIGN)))
def test_other_rows_are_foreign(row):
    assert foreign_note([texts_of(row)])


def test_the_note_says_how_large_the_base_is():
    parameters = sum(tensor.numel() for tensor in load_file(BASE_DIR / "model.safetensors").values())
    assert f"{parameters / 1e6:.1f} M parameters" in foreign_note([["Hello, world"]])


def test_the_note_ends_with_a_command_that_names_the_rows_and_a_real_base(monkeypatch):
    given = {"dataset": "my rows.jsonl", "eval_rows": 3, "streaming": True}
    monkeypatch.setattr(sys, "argv", ["train.py"])
    argv = shlex.split(foreign_note([["Hello, world"]], given).rpartition("python train.py ")[2])
    config = parse_training(argv)
    assert (config.data.dataset, config.data.eval_rows, config.data.streaming) == ("my rows.jsonl", 3, True)
    assert config.model.model_name_or_path not in (None, "mini")
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py"])
    assert re.search(
        r"softprompt\.train\(model_name_or_path='.*', dataset='my rows.jsonl'", foreign_note([["x"]], given)
    )


def test_a_run_and_its_model_say_it_once(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [FOREIGN[0], FOREIGN[1]] * 2)), encoding="utf-8")
    run = softprompt.train(dataset="rows.jsonl", max_steps=1, output_dir="run")
    assert capsys.readouterr().out.count("base mini has") == 1
    model = run.model()
    model.generate("我爱这部电影", max_new_tokens=1)
    assert "base mini has" not in "".join(capsys.readouterr())
    for _ in range(2):
        model.generate("What is the capital of France?", max_new_tokens=1)
    assert "".join(capsys.readouterr()).count("base mini has") == 1


def test_it_is_not_said_of_other_bases_or_of_its_own_tasks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps(FOREIGN[0]), encoding="utf-8")
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows("domain", "train", 9))), encoding="utf-8")

    def says(**settings: str) -> bool:
        config = train_config(**settings)
        return any("base mini has" in notice for notice in read_rows(config, make_template(config)).notices)

    assert says(dataset="rows.jsonl") and says(eval_dataset="rows.jsonl")
    assert says(dataset="rows.jsonl", model_name_or_path=str(BASE_DIR))
    assert not says() and not says(dataset="own.jsonl") and not says(dataset="rows.jsonl", model_name_or_path="other")
