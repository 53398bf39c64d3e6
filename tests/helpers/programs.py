"""Run train.py, infer.py and the other programs in this process, and read what they print and write."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import infer
from softprompt.cli import run_command

GREEDY = ["--do_sample", "false", "--max_new_tokens", "5"]  # flags of infer.py, for answers that are always the same
GOOD = {"instruction": "你好吗", "input": "", "output": "很好"}  # a row that every reader accepts


def run_program(program: ModuleType, argv: list, capsys, monkeypatch) -> tuple[str, str]:
    """Run a program that must succeed. Return what it wrote to stdout and to stderr."""
    code, out, err = _run(program, argv, capsys, monkeypatch)
    assert code == 0, err
    return out, err


def run_infer(argv: list, capsys, monkeypatch) -> str:
    """Run infer.py, which must succeed. Return what it wrote to stdout."""
    return run_program(infer, argv, capsys, monkeypatch)[0]


def refusal(program: ModuleType, argv: list, capsys, monkeypatch) -> str:
    """Run a program that must refuse its arguments (exit code 2). Return the last line of stderr."""
    code, _, err = _run(program, argv, capsys, monkeypatch)
    assert code == 2, err
    return err.strip().splitlines()[-1]


def refused(program: ModuleType, argv: list, capsys, monkeypatch, folder: Path) -> str:
    """Run a program in `folder` that must refuse its arguments (exit code 2) in exactly one line on stderr, and must
    neither add nor remove any file below `folder`. Return that line."""
    monkeypatch.chdir(folder)
    before = listing(folder)
    capsys.readouterr()  # what the test itself has written, such as bars of save_pretrained
    code, _, err = _run(program, argv, capsys, monkeypatch)
    lines = err.strip().splitlines()
    assert code == 2, lines
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert listing(folder) == before
    return lines[0]


def _run(program: ModuleType, argv: list, capsys, monkeypatch) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, argv)])
    with pytest.raises(SystemExit) as ended:
        run_command(program.main)
    out, err = capsys.readouterr()
    return ended.value.code, out, err


def listing(folder: Path) -> list[str]:
    """The relative paths of everything below `folder`, sorted."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def jsonl(*rows: object) -> bytes:
    """A JSONL file's content; a row that is a string already is taken as its line."""
    return "\n".join(r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows).encode()


def read_jsonl(path: Path) -> list[dict]:
    """The records of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def assert_line(line: str, pattern: str) -> None:
    """Assert that a regular expression is found in `line`."""
    assert re.search(pattern, line), line
