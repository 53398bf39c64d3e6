"""The folder of a run that is not given one says the base and the rows."""

import re

import pytest

from softprompt.config.loader import train_config
from softprompt.runs.output_dir import MAX_NAME, choose_output_dir

NAMES = {
    "mini-opinion": {"dataset": "mini:opinion"},
    "mini-sentiment": {},
    "mini-rows": {"dataset": "some/where/rows.jsonl"},
    "bloom-1b4-zh-alpaca-zh": {"preset": "bloom-1b4-zh", "dataset": "shibing624/alpaca-zh"},
    "Qwen3-0.6B-评论": {"model_name_or_path": "Qwen/Qwen3-0.6B", "dataset": "评论.csv"},
    "base-my-rows-v1.2": {"model_name_or_path": "../bases/base/", "dataset": "~/my rows (v1.2)"},
}


@pytest.mark.parametrize("name", NAMES)
def test_default_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = choose_output_dir(train_config(**NAMES[name]), None)
    assert re.fullmatch(rf"runs/{re.escape(name)}-\d{{8}}-\d{{6}}", folder.as_posix())


def test_a_long_name_is_cut(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = choose_output_dir(train_config(dataset="a" * 200 + ".jsonl"), None)
    assert len(folder.name) <= len("mini-") + MAX_NAME + len("-20260131-120000")
