"""What holds for the whole package; which package may import which is import-linter's (pyproject.toml)."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from setuptools import find_packages

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "softprompt"
ENTRANCES = {"__init__", "__main__", "api", "cli", "doctor", "inference"}


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


def test_what_earlier_versions_offered_is_offered_without_loading_torch():
    code = """
import sys
import softprompt, softprompt.export, softprompt.report, softprompt.study
from softprompt.errors import ConfigError, SoftpromptError
assert dir(softprompt) == ["SoftPromptModel", "train"], dir(softprompt)
assert softprompt.errors.ConfigError is ConfigError and "torch" not in sys.modules
from softprompt.export import export
from softprompt.report import report
from softprompt.study import run_study
assert all(map(callable, (export, report, run_study, softprompt.train, softprompt.SoftPromptModel)))
assert softprompt.export.export is export and softprompt.report.report is report
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_wheel_holds_every_package_and_data_file():
    """By the settings in pyproject.toml that setuptools builds wheels from."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packages = {path.parent.relative_to(ROOT) for path in PACKAGE.rglob("*.py")}
    found = find_packages(str(ROOT), include=setuptools["packages"]["find"]["include"])
    assert set(found) == {".".join(p.parts) for p in packages}
    data = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    patterns = setuptools["package-data"].items()
    assert data == {path for package, globs in patterns for glob in globs for path in _package(package).glob(glob)}


def _package(name: str) -> Path:
    return ROOT.joinpath(*name.split("."))


def test_no_test_module_imports_another():
    for path in (ROOT / "tests").rglob("*.py"):
        assert not {name for name in imported(path) if name.startswith("test_")}, path


@pytest.mark.parametrize("name", ["train.py", "infer.py"])
def test_entrances_only_wire(name):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 60
