"""README.md, README.zh-CN.md and docs/: in step with each other, and with the flags, modules and files that exist."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from softprompt.config.infer_args import INFER_GROUPS
from softprompt.config.loader import GROUPS
from softprompt.export.args import ExportArguments
from softprompt.report.args import ReportArguments
from softprompt.serving.args import SERVE_GROUPS

ROOT = Path(__file__).parent.parent
READMES = ["README.md", "README.zh-CN.md"]
GUIDES = ["bases-and-engines", "data", "development", "how-it-works", "inference", "larger-than-memory"]
GUIDES = [f"docs/{name}.md" for name in (*GUIDES, "learning-rate", "never-lost", "serving", "training", "distillation")]
PAGES = [*READMES, *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("docs/*.md"))), "benchmarks/README.md"]
OF_OTHERS = {"nproc_per_node", "max_restarts", "shutdown_timeout"}  # torchrun's
# Flags that no dataclass below has: those of the programs themselves, and of the benchmarks that the guides name.
OF_OURS = {"preset", "config", "help", "size", "starts", "seeds", "tasks", "rates", "watch", "lang"}


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str) -> list[str]:
    """Code blocks without their comments, which are translated."""
    found = re.findall(r"^```\w+\n(.*?)^```", text_of(name), re.S | re.M)
    return [re.sub(r"\s+# .*", "", block) for block in found]


def anchors(name: str) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text_of(name), flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_both_show_the_same_commands_and_output():
    assert blocks("README.md") == blocks("README.zh-CN.md")
    assert len(blocks("README.md")) >= 6


def test_both_have_the_same_sections():
    levels = [re.findall(r"^(#+) ", text_of(name), re.M) for name in READMES]
    assert levels[0] == levels[1]


def test_the_readme_is_an_entrance():
    assert len(text_of("README.md").splitlines()) <= 136


@pytest.mark.parametrize("name", [*READMES, *GUIDES])
def test_every_flag_named_exists(name):
    groups = (*GROUPS, *INFER_GROUPS, *SERVE_GROUPS, ExportArguments, ReportArguments)
    known = {f.name for group in groups for f in fields(group)}
    text = re.sub(r"(?m)^.*\b(ruff|vllm) .*$", "", text_of(name))
    named = set(re.findall(r"(?<![\w-])--([a-z][a-z_0-9]*)", text))
    assert named - known - OF_OTHERS - OF_OURS == set()


@pytest.mark.parametrize("name", PAGES)
def test_python_shown_is_python(name):
    for block in re.findall(r"^```python\n(.*?)^```", text_of(name), re.S | re.M):
        compile(block, name, "exec")


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(name)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        assert not anchor or anchor in anchors(str(file.resolve().relative_to(ROOT))), target


@pytest.mark.parametrize("name", ["docs/how-it-works.md", "docs/development.md"])
def test_every_module_named_exists(name):
    for module in re.findall(r"`([a-z_/]+\.py)`", text_of(name)):
        assert any((ROOT / place / module).exists() for place in ("softprompt", ".")), module


def test_the_two_set_up_commands_are_in_the_first_screen():
    first = "\n".join(text_of("README.md").splitlines()[:20])
    assert 'pip install -e ".[plot]" && python train.py' in first
    assert 'pip install -e ".[test]" && pytest' in first
