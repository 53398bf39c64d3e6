"""Shared by several test modules."""

import sys

import pytest

from softprompt.cli import run_command


def called(program, argv, capsys, monkeypatch) -> tuple[str, str]:
    """Run a program that must succeed; returns what it wrote to stdout and stderr."""
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, argv)])
    with pytest.raises(SystemExit) as ended:
        run_command(program.main)
    out = capsys.readouterr()
    assert ended.value.code == 0, out.err
    return out.out, out.err
