"""What tests of infer.py share: the program, called in this process."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

import infer
from softprompt.cli import run_command

GREEDY = ["--do_sample", "false", "--max_new_tokens", "5"]


def called(argv: list, capsys, monkeypatch) -> str:
    monkeypatch.setattr(sys, "argv", ["infer.py", *map(str, argv)])
    with pytest.raises(SystemExit) as ended:
        run_command(infer.main)
    out, err = capsys.readouterr()
    assert ended.value.code == 0, err
    return out


def refusal(program: ModuleType, argv: list, capsys, monkeypatch) -> str:
    """The one line with which a program refuses its arguments."""
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, argv)])
    with pytest.raises(SystemExit) as ended:
        run_command(program.main)
    err = capsys.readouterr().err
    assert ended.value.code == 2, err
    return err.strip().splitlines()[-1]


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
