"""What tests of infer.py share: the program, called in this process."""

import json
import sys
from pathlib import Path

import pytest

import infer
from softprompt.cli import command

GREEDY = ["--do_sample", "false", "--max_new_tokens", "5"]


def called(argv: list, capsys, monkeypatch) -> str:
    monkeypatch.setattr(sys, "argv", ["infer.py", *map(str, argv)])
    with pytest.raises(SystemExit) as ended:
        command(infer.main)
    out, err = capsys.readouterr()
    assert ended.value.code == 0, err
    return out


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
