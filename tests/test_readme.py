"""README.md and README.zh-CN.md: in step with each other and with the flags there are."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from softprompt.config.infer_args import INFER_GROUPS
from softprompt.config.loader import GROUPS
from softprompt.export.args import ExportArguments

OTHERS = {"check", "nproc_per_node", "max_restarts"}  # ruff's and torchrun's
ROOT = Path(__file__).parent.parent
NAMES = ["README.md", "README.zh-CN.md"]


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str) -> list[str]:
    """Code blocks but the picture, whose words are translated."""
    found = re.findall(r"^```\w+\n(.*?)^```", text_of(name), re.S | re.M)
    return [block for block in found if "──►" not in block]


def test_both_show_the_same_commands_and_output():
    assert blocks("README.md") == blocks("README.zh-CN.md")
    assert len(blocks("README.md")) >= 6


def test_both_have_the_same_sections():
    levels = [re.findall(r"^(#+) ", text_of(name), re.M) for name in NAMES]
    assert levels[0] == levels[1]


@pytest.mark.parametrize("name", NAMES)
def test_every_flag_named_exists(name):
    known = {f.name for group in (*GROUPS, *INFER_GROUPS, ExportArguments) for f in fields(group)} | {
        "preset",
        "config",
        "help",
    }
    named = set(re.findall(r"--([a-z][a-z_0-9]*)", text_of(name)))
    assert named - known - OTHERS == set()
    assert len(named) > 15


@pytest.mark.parametrize("name", NAMES)
def test_python_shown_is_python(name):
    for block in re.findall(r"^```python\n(.*?)^```", text_of(name), re.S | re.M):
        compile(block, name, "exec")


def test_the_two_set_up_commands_are_in_the_first_screen():
    first = "\n".join(text_of("README.md").splitlines()[:20])
    assert 'pip install -e ".[plot]" && python train.py' in first
    assert 'pip install -e ".[test]" && pytest' in first
