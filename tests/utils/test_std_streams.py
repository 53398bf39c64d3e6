"""Standard streams of any encoding, closed ones, and pipes without a reader."""

import io
import json
import os
import sys

import pytest
from helpers.adapters import write_adapter

import infer
import softprompt
import train
from softprompt.cli import run_command
from softprompt.utils.std_streams import tolerant_streams

ROWS = [{"instruction": f"第{i}题😀", "output": "好👍"} for i in range(8)]


class Stream(io.TextIOWrapper):
    """A text stream of an encoding that keeps its bytes in memory."""

    def __init__(self, encoding):
        super().__init__(io.BytesIO(), encoding=encoding, write_through=True)

    @property
    def text(self):
        return self.buffer.getvalue().decode(self.encoding)


def ended(program, argv, monkeypatch, **streams):
    """The exit code of a program over other streams."""
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, argv)])
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    with pytest.raises(SystemExit) as end:
        run_command(program.main, prints_answers=program is infer)
    return end.value.code


@pytest.fixture
def flags(tiny_base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return ["--model_name_or_path", tiny_base, "--dataset", "rows.jsonl", "--eval_rows", "2", "--max_steps", "1"]


@pytest.mark.parametrize("encoding", ["gbk", "cp1252", "ascii", "utf-16"])
def test_a_run_succeeds_in_any_encoding(encoding, flags, monkeypatch):
    out = Stream(encoding)
    assert ended(train, [*flags, "--output_dir", "run"], monkeypatch, stdout=out) == 0
    assert "Try: python infer.py" in out.text and out.errors == "strict"
    assert ("😀" if encoding == "utf-16" else "\\U0001f600") in out.text


@pytest.mark.parametrize("encoding", ["gbk", "cp1252", "ascii"])
def test_answers_with_characters_that_the_encoding_lacks(encoding, place, monkeypatch):
    (place / "q.jsonl").write_text('{"prompt": "题😀"}\n', encoding="utf-8")
    out = Stream(encoding)
    asked = ["--adapter", "a", "--prompts_file", "q.jsonl", "--max_new_tokens", "2", "--do_sample", "false"]
    assert ended(infer, asked, monkeypatch, stdout=out) == 0
    assert json.loads(out.text)["prompt"] == "题😀"  # as a JSON escape
    out = Stream(encoding)
    assert ended(infer, ["--adapter", "a", "--prompt", "题", "--max_new_tokens", "2"], monkeypatch, stdout=out) == 0


def test_a_run_survives_the_readers_of_its_messages(flags, tmp_path, monkeypatch):
    """Both streams are pipes without a reader, as after `2>&1 | head -1`."""
    pipes = []
    for _ in range(2):
        reader, writer = os.pipe()
        os.close(reader)
        pipes.append(os.fdopen(writer, "w", buffering=1))
    argv = [*flags, "--output_dir", "run"]
    assert ended(train, argv, monkeypatch, stdout=pipes[0], stderr=pipes[1]) == 0
    assert (tmp_path / "run/all_results.json").exists()
    for pipe in pipes:
        pipe.close()  # its buffer was redirected to the null device


def test_infer_ends_quietly_when_its_reader_leaves(place, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    (place / "q.txt").write_text("a\n" * 3, encoding="utf-8")
    with os.fdopen(writer, "w") as gone:
        argv = ["--adapter", "a", "--prompts_file", "q.txt", "--max_new_tokens", "2"]
        assert ended(infer, argv, monkeypatch, stdout=gone) == 0
    assert "error" not in capsys.readouterr().err


def test_lines_are_written_at_once(monkeypatch):
    """A program that is stopped, or that still works, has told a file what it did."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    with tolerant_streams():
        print("loading …")
        assert stream.buffer.getvalue() == "loading …\n".encode()
    print("buffered")
    assert b"buffered" not in stream.buffer.getvalue()


def test_closed_streams(place, flags, tmp_path, monkeypatch):
    closed = {"stdin": None, "stdout": None, "stderr": None}
    assert ended(train, [*flags, "--output_dir", "run"], monkeypatch, **closed) == 0
    assert (tmp_path / "run/all_results.json").exists()
    assert ended(infer, ["--adapter", "a", "--prompt", "题", "--max_new_tokens", "2"], monkeypatch, **closed) == 0
    assert ended(infer, ["--adapter", "a"], monkeypatch, **closed) == 2  # no terminal to chat on


def test_training_from_python_in_another_encoding(flags, tiny_base, monkeypatch):
    out = Stream("ascii")
    monkeypatch.setattr(sys, "stdout", out)
    softprompt.train(model_name_or_path=str(tiny_base), dataset="rows.jsonl", max_steps=1, output_dir="run")
    assert sys.stdout is out and out.errors == "strict" and "\\U0001f600" in out.text


def test_paths_of_any_kind(flags, tiny_base, tmp_path, monkeypatch):
    """A leading ~ is the home folder, in Python, in TOML and after `--flag=`; path objects are accepted."""
    home = tmp_path / "家 dir"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (tmp_path / "rows.jsonl").rename(home / "rows.jsonl")
    (home / "c.toml").write_text('dataset = "~/rows.jsonl"\noutput_dir = "~/.run"\nmax_steps = 1', encoding="utf-8")
    argv = ["--model_name_or_path", tiny_base, "--config=~/c.toml"]
    assert ended(train, argv, monkeypatch) == 0
    write_adapter(home / "b", tiny_base, 3)
    for adapter in ("~/.run", "x=~/.run", home / ".run"):
        argv = [f"--adapter={adapter}", "--prompt", "题", "--max_new_tokens", "2"]
        assert ended(infer, argv, monkeypatch) == 0
    run = softprompt.train(
        model_name_or_path=tiny_base, dataset=home / "rows.jsonl", output_dir=tmp_path / "p", max_steps=1
    )
    assert run.output_dir == tmp_path / "p"
    model = softprompt.SoftPromptModel.from_pretrained(tiny_base, home / "b")
    assert model.prompt.shape == (3, 32)


def test_without_a_home_folder_nothing_is_cached_in_the_working_folder(monkeypatch, tmp_path):
    from softprompt.utils.atomic_io import cache_dir

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as if neither HOME nor passwd named one
    with pytest.raises(OSError):
        cache_dir("tokens").mkdir(parents=True)
