"""The fixture `place`: a study file over a small dataset."""

import json

import pytest
from helpers.study_files import ROWS

from softprompt.study.grid import parse_study


@pytest.fixture
def place(tmp_path, tiny_base):
    """A function that writes a study file over a small dataset and reads it; `folder` is where."""
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    settings = {
        "model_name_or_path": str(tiny_base),
        "dataset": str(tmp_path / "rows.jsonl"),
        "eval_rows": 5,
        "max_steps": 2,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 1,
    }
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]

    def write(head="", grid="", more=()):
        text = "\n".join([f'output_dir = "{tmp_path / "out"}"', head, "[settings]", *lines, *more, grid])
        (tmp_path / "s.toml").write_text(text, encoding="utf-8")
        return parse_study([str(tmp_path / "s.toml")])

    write.folder = tmp_path
    return write
