"""`--help` of every command, as a newcomer reads it on a terminal of 80 or 120 columns."""

import re
import shlex
import sys
from dataclasses import fields

import pytest

from softprompt.cli import COMMANDS, main
from softprompt.config.command_line import parse_chat, parse_inference, parse_training
from softprompt.config.loader import GROUPS, PRESETS
from softprompt.export.args import parse_export
from softprompt.export.push_args import parse_push
from softprompt.report.args import parse_report
from softprompt.utils.text_table import display_width, wrap

PARSERS = {
    "train": parse_training,
    "infer": parse_inference,
    "chat": parse_chat,
    "export": parse_export,
    "push": parse_push,
    "report": parse_report,
}


def help_of(name: str, width: int, capsys, monkeypatch) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys, "argv", ["softprompt", *([name] if name else []), "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    return capsys.readouterr().out


def commands_in(text: str) -> list[list[str]]:
    """The arguments of the commands at the end of a help text, as a shell reads them."""
    _, _, end = text.partition("\nexamples:\n")
    joined = end.replace("\\\n", " ")
    return [shlex.split(line) for line in joined.splitlines() if line.startswith("    ")]


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_the_terminal_and_ends_with_commands_that_work(name, width, capsys, monkeypatch):
    text = help_of(name, width, capsys, monkeypatch)
    assert max(map(display_width, text.splitlines())) <= width
    commands = commands_in(text)
    assert len(commands) == (1 if name == "doctor" else 3)
    for words in commands:
        program = words.pop(0)
        assert program.endswith("softprompt") or [program, *words[:2]] == ["python", "-m", "softprompt"]
        command, *arguments = words if program != "python" else words[2:]
        assert command == name or (not name and command in COMMANDS)
        if command in PARSERS:
            PARSERS[command](arguments)


def test_presets_come_first_with_what_they_hold(capsys, monkeypatch):
    text = help_of("train", 120, capsys, monkeypatch)
    flags = re.findall(r"^  --(\w+)", text, re.M)
    assert flags[0] == "preset" and len(flags) == len(set(flags)) == 3 + sum(len(fields(group)) for group in GROUPS)
    start = " ".join(text[: text.index("  --config")].split())
    for name, values in PRESETS.items():
        held = start[start.index(f" {name}: ") :].partition("(")[2].partition(")")[0]
        assert held.split() == [f"--{key}={value}" for key, value in values.items()]


def test_everyday_flags_come_before_those_of_experts(capsys, monkeypatch):
    text = help_of("train", 80, capsys, monkeypatch)
    everyday = ["model_name_or_path", "dataset", "eval_rows", "num_virtual_tokens", "learning_rate", "push_to_hub"]
    experts = ["max_activation_gib", "engine", "buffer_size", "vocab_population", "adam_beta1", "hub_token"]
    assert max(text.index(f"\n  --{name}") for name in everyday) < min(text.index(f"\n  --{name}") for name in experts)


def test_defaults_that_apply_are_shown(capsys, monkeypatch):
    text = " ".join(help_of("train", 80, capsys, monkeypatch).split())
    batch = text[text.index("--per_device_train_batch_size N ") :]
    assert "32 with --preset mini" in batch[: batch.index(" --learning_rate ")]
    rate = text[text.index("--learning_rate RATE ") :]
    assert "5e-05 with --preset article" in rate[: rate.index(" --find_learning_rate ")]


def test_names_of_values_are_short(capsys, monkeypatch):
    for name in ("train", "infer"):
        text = help_of(name, 80, capsys, monkeypatch)
        values = re.findall(r"^  --\w+ (\S+)", text, re.M)
        assert len(values) > 20 and all(len(value) <= 34 for value in values)
        assert not any(value.isupper() and len(value) > 9 for value in values), values


def test_wrapping_keeps_words_and_indentation():
    assert wrap("  a bb ccc", 6, "    ") == ["  a bb", "    ccc"]
    assert wrap("评论 是 正面 的", 7) == ["评论 是", "正面 的"]
    assert wrap("longer than the line", 4) == ["longer", "than", "the", "line"]
    assert wrap("", 9) == [""]
