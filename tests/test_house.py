"""What holds for the whole package; which package may import which is import-linter's (pyproject.toml)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "softprompt"
ENTRANCES = {"__init__", "__main__", "api", "cli", "inference"}


def imported(path: Path) -> set[str]:
    """The first part of the name of every module that a file imports."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {name.split(".")[0] for name in plain | {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}}


def test_only_entrances_and_packages_stand_in_the_first_folder():
    assert {path.stem for path in PACKAGE.glob("*.py")} == ENTRANCES


def test_every_package_says_what_it_holds():
    for path in PACKAGE.glob("*/__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_peft_is_not_used():
    for path in PACKAGE.rglob("*.py"):
        assert not imported(path) & {"peft", "accelerate", "pickle"}, path


@pytest.mark.parametrize("module", ["softprompt", "softprompt.cli", "softprompt.mini.tasks"])
def test_a_wrong_flag_need_not_wait_for_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_no_test_module_imports_another():
    for path in (ROOT / "tests").rglob("*.py"):
        assert not {name for name in imported(path) if name.startswith("test_")}, path


@pytest.mark.parametrize("name", ["train.py", "infer.py"])
def test_entrances_only_wire(name):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 60
