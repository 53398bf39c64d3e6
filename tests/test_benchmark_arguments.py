"""The flags of the benchmarks: a wrong number is refused in one line."""

import ast
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load(name):
    spec = spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_benchmark_takes_its_numbers_through_one_parser():
    for path in BENCHMARKS.glob("*.py"):
        calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert "argparse.ArgumentParser" not in calls, path


@pytest.mark.parametrize("value", ["0", "-3", "1.5", "x"])
def test_a_whole_number_must_be_positive(value, capsys):
    arguments = load("arguments")
    parser = arguments.ArgumentParser("description")
    parser.add_argument("--rows", type=int, nargs="+", default=[3])
    parser.add_argument("--seeds", type=arguments.seed, nargs="+")
    assert parser.parse_args(["--rows", "1", "2", "--seeds", "0"]).rows == [1, 2]
    for flag in ("--rows", "--seeds"):
        if (flag, value) != ("--seeds", "0"):
            with pytest.raises(SystemExit) as ended:
                parser.parse_args([f"{flag}={value}"])
            err = capsys.readouterr().err
            assert ended.value.code == 2 and err.count("\n") == 1 and flag in err and repr(value) in err
