"""Bad input as the programs see it, and what a refusal looks like."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers.bases import make_bloom

from softprompt.cli import run_command
from softprompt.prompt.adapter_io import Adapter, adapter_files, peft_config
from softprompt.utils.atomic_io import write_folder

GOOD = {"instruction": "你好吗", "input": "", "output": "很好"}


def listing(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def refused(program, argv: list, capsys, monkeypatch, folder: Path) -> str:
    """Run a program in `folder` that must refuse; returns its one line."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, argv)])
    before = listing(folder)
    with pytest.raises(SystemExit) as ended:
        run_command(program.main)
    lines = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2, lines
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert listing(folder) == before
    return lines[0]


def jsonl(*rows) -> bytes:
    return "\n".join(r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows).encode()


def assert_line(line: str, pattern: str) -> None:
    assert re.search(pattern, line), line


def write_adapter(folder: Path, hidden_size: int = 32, base: str = "some/base") -> None:
    values = torch.ones(3, hidden_size)
    config = peft_config(base, make_bloom(hidden_size=hidden_size).config, values, "RANDOM")
    write_folder(folder, adapter_files(Adapter(values, config, {"template": "default"})))
