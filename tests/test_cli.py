"""The two programs from their command line: how each error ends them, and bad input that only a whole run meets.

What a newcomer is likely to get wrong is in test_bad_input.py; what a good run leaves is in test_runs.py.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers.adapters import write_adapter
from helpers.bases import make_tokenizer
from helpers.programs import GOOD, assert_line, jsonl, refused
from safetensors.torch import save

import infer
import train
from softprompt.cli import COMMANDS, main, run_command
from softprompt.utils.errors import (
    ConfigError,
    DataError,
    PartialFailureError,
    PushError,
    SoftpromptError,
    TrainingError,
)


@pytest.mark.parametrize(
    "raised, code, line",
    [
        (ConfigError("--a is wrong"), 2, "error: --a is wrong"),
        (DataError("a\n\n  b"), 2, "error: a b"),
        (TrainingError("step 3"), 1, "error: step 3"),
        (OSError(28, "No space left on device", "run/x"), 1, "error: run/x: No space left on device"),
        (KeyboardInterrupt(), 130, "error: stopped"),
        (None, 0, ""),
    ],
    ids=repr,
)
def test_how_a_program_ends(raised, code, line, capsys):
    def main(argv):
        if raised:
            raise raised

    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert (ended.value.code, capsys.readouterr()) == (code, ("", line + "\n" if line else ""))


def test_every_error_for_bad_input_ends_with_2():
    """The others stand for work that had begun: a run, an upload of a whole run, some of many."""
    others = {kind for kind in SoftpromptError.__subclasses__() if kind.exit_code != 2}
    assert others == {TrainingError, PushError, PartialFailureError}


@pytest.mark.parametrize("fault", [ZeroDivisionError("by\n0"), OSError("odd")], ids=repr)
def test_a_fault_in_the_program_itself_leaves_its_traceback_in_a_file(fault, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def main(argv):
        raise fault

    with pytest.raises(SystemExit) as ended:
        run_command(main)
    (file,) = tmp_path.iterdir()
    what = f"{type(fault).__name__}: {' '.join(str(fault).split())}"
    line = f"error: unexpected {what}; the traceback is in {file}\n"
    assert (ended.value.code, capsys.readouterr().err) == (1, line)
    assert "raise fault" in file.read_text() and "command: " in file.read_text()


@pytest.mark.parametrize("restarts, code", [("0", 1), ("3", 0)])
def test_an_ended_run_that_was_not_uploaded_is_not_started_again(restarts, code, capsys, monkeypatch):
    """torchrun starts again whatever ends with another code than 0, where it may."""

    def main(argv):
        raise PushError("the run is whole in run, but not on the hub")

    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    line = "error: the run is whole in run, but not on the hub\n"
    assert (ended.value.code, capsys.readouterr().err) == (code, line)


ROOT = Path(__file__).parent.parent


def in_a_process(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=ROOT)


def softprompt_command(argv, capsys, monkeypatch, program="/bin/softprompt") -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command `softprompt`."""
    monkeypatch.setattr(sys, "argv", [program, *argv])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, *capsys.readouterr()


@pytest.mark.parametrize("argv", [[], ["--help"], ["help"]], ids=repr)
def test_the_command_lists_its_commands(argv, capsys, monkeypatch):
    code, out, err = softprompt_command(argv, capsys, monkeypatch)
    assert (code, err) == (0, "") and out.startswith("usage: softprompt ")
    assert all(f"\n    {name} " in out for name in COMMANDS)


STARTS = {  # sys.argv[0], the usage of `train`
    "train.py": "train.py",
    "../my code/train.py": "train.py",
    "/bin/softprompt": "softprompt train",
    "/x/softprompt/__main__.py": "python -m softprompt train",
}


@pytest.mark.parametrize("program", STARTS)
def test_help_names_the_command_as_it_was_typed(program, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program])
    with pytest.raises(SystemExit) as ended:
        run_command(train.main, ["--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {STARTS[program]} [")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_its_flags(name, capsys, monkeypatch):
    code, out, _ = softprompt_command([name, "--help"], capsys, monkeypatch)
    assert code == 0 and out.startswith(f"usage: softprompt {name} ")


def test_an_unknown_command_is_refused(capsys, monkeypatch):
    code, out, err = softprompt_command(["trian"], capsys, monkeypatch)
    assert (code, out) == (2, "") and "trian; did you mean train?" in err


@pytest.mark.parametrize(
    "asked", [["--prompt", "a"], ["--eval_dataset", "b"], ["--choices", "a,b"], ["hello"]], ids=repr
)
def test_chat_refuses_questions(asked, capsys, monkeypatch):
    code, out, err = softprompt_command(["chat", *asked], capsys, monkeypatch)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert asked[0] in err and "conversation" in err and "infer --prompt" in err


def test_chat_shows_none_of_the_flags_that_it_refuses(capsys, monkeypatch):
    _, out, _ = softprompt_command(["chat", "--help"], capsys, monkeypatch)
    assert "--prompt" not in out and {"--adapter", "--temperature", "--stream"} <= set(out.split())


def test_chat_needs_a_terminal(capsys, monkeypatch):
    code, out, err = softprompt_command(["chat"], capsys, monkeypatch)
    assert (code, out) == (2, "") and "terminal" in err


@pytest.mark.parametrize("name", ["export", "report", "study"])
def test_earlier_names_of_commands_say_the_present_one(name):
    ended = in_a_process("-m", f"softprompt.{name}", "runs/a")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ") and f"python -m softprompt {name}" in ended.stderr


@pytest.mark.parametrize("name", ["train.py", "infer.py"])
def test_a_wrong_flag_does_not_wait_for_torch(name):
    """In a process of its own, where torch is not imported yet and may not be."""
    code = (
        "import runpy, sys; sys.modules['softprompt.training.run'] = sys.modules['softprompt.api'] = None; "
        f"sys.argv = ['x', '--sed', '1']; runpy.run_path({str(ROOT / name)!r}, run_name='__main__')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr == "error: unknown flag --sed; did you mean --seed?\n"


FOLDERS_THAT_ARE_MISSING = [
    *(["report", "nope"], ["report", "--watch", "nope"], ["export", "nope", "--output", "x"], ["push", "nope"]),
    *(
        ["chat", "--adapter", "nope"],
        ["infer", "--adapter", "a=nope", "--prompt", "?"],
        ["serve", "--adapters", "nope"],
    ),
    ["study", "nope"],
]


def test_a_folder_that_does_not_exist_is_refused_without_torch():
    code = f"""
import sys
sys.modules.update(dict.fromkeys(["torch", "transformers"]))  # importing them fails
from softprompt import cli
for argv in {FOLDERS_THAT_ARE_MISSING}:
    try:
        cli.run_command(cli.COMMANDS[argv[0]].run, argv[1:])
    except SystemExit as end:
        print(argv[0], end.code, file=sys.stderr, flush=True)
"""
    told = in_a_process("-c", code).stderr.splitlines()
    assert told[1::2] == [f"{argv[0]} 2" for argv in FOLDERS_THAT_ARE_MISSING]
    assert all(line.startswith("error: ") and "nope" in line for line in told[::2]) and "no such" in told[0]


TRAINING = {
    "--output_dir ": "--output_dir is empty",
    "--num_train_epochs inf": "--num_train_epochs inf is not a finite number",
    "--seed 99999999999999999999": "--seed 99999999999999999999 must lie in [0, 2**63)",
    "--eval_dataset none.jsonl": "none.jsonl: no such file",
    "--eval_dataset bad.jsonl": "bad.jsonl, line 2: column 'output' must be a text, found null",
    "--eval_rows 2": "--eval_rows 2 leaves none of the 2 rows of rows.jsonl to train on",
    "--eval_rows 9": "--eval_rows 9 leaves none",
    "--init_adapter adapter --num_virtual_tokens 4": "--init_adapter adapter has 3; leave --num_virtual_tokens out",
    "--template {instruction}{output}": "leave {output} out",
    "--dataset rows.parquet": "rows.parquet, row 2: column 'output' must be a text, found null",
    "--dataset folder": "folder, row 2: column 'output' must be a text, found null",
    "--dataset half.jsonl": "half.jsonl, line 1: column 'instruction' must be a text, found half a character",
    "--dataset mini:sentimental": "unknown mini task 'sentimental'",
    "--model_name_or_path endless": "endless: its tokenizer has no eos_token",
    "--model_name_or_path rows.jsonl": "base model 'rows.jsonl': no such folder (looked for ",
    "--device cuda:7": "--device cuda:7: ",
    "--output_dir deep/rows.jsonl/run": "rows.jsonl is not a folder; name a folder",
    "--output_dir link": "link is not a folder; name a folder",
}


@pytest.mark.parametrize("flags", TRAINING)
def test_training_is_refused(flags, tiny_base, tmp_path, capsys, monkeypatch):
    import datasets
    from huggingface_hub import constants

    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    (tmp_path / "deep").mkdir()
    for name in ("rows.jsonl", "deep/rows.jsonl"):
        (tmp_path / name).write_bytes(jsonl(GOOD, GOOD))
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "half.jsonl").write_text('{"instruction": "\\ud83d", "output": "a"}')
    bad = [GOOD, {**GOOD, "output": None}]
    (tmp_path / "bad.jsonl").write_bytes(jsonl(*bad))
    Dataset.from_list(bad).to_parquet(tmp_path / "rows.parquet")
    Dataset.from_list(bad).save_to_disk(tmp_path / "folder")
    shutil.copytree(tiny_base, tmp_path / "endless")
    endless = make_tokenizer()
    endless.eos_token = None
    endless.save_pretrained(tmp_path / "endless")
    write_adapter(tmp_path / "adapter")
    capsys.readouterr()
    argv = ["--model_name_or_path", tiny_base, "--dataset", "rows.jsonl", *flags.split(" ")]
    assert TRAINING[flags] in refused(train, argv, capsys, monkeypatch, tmp_path)


def weights(folder: Path, value: float) -> None:
    values = torch.full((3, 32), value)
    (folder / "adapter_model.safetensors").write_bytes(save({"prompt_embeddings": values}))


def setting(folder: Path, file: str, **changes: object) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


SPOILED = {
    "pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        "adapter_model.safetensors is missing; adapter_model.bin is a pickle and is not read",
    ),
    "not a number": (lambda f: weights(f, float("nan")), "holds values that are not finite"),
    "LoRA": (lambda f: setting(f, "adapter_config.json", peft_type="LORA"), "peft_type is 'LORA', expected"),
    "no base": (lambda f: setting(f, "adapter_config.json", base_model_name_or_path=None), "names no base; give --mod"),
    "no such base": (lambda f: setting(f, "adapter_config.json", base_model_name_or_path="/none"), "'/none': no such"),
    "a template's type": (lambda f: setting(f, "softprompt.json", template=3), "template 3 is not a text"),
    "a setting's type": (lambda f: setting(f, "softprompt.json", generation={"top_k": "x"}), "--top_k 'x' is not a wh"),
    "a setting's name": (lambda f: setting(f, "softprompt.json", generation={"beams": 1}), "unknown generation"),
    "a setting's size": (lambda f: setting(f, "softprompt.json", generation={"top_p": 3}), "--top_p 3 must lie above"),
    "settings not JSON": (lambda f: (f / "softprompt.json").write_text("{"), "softprompt.json: cannot be read as JSON"),
}


@pytest.mark.parametrize("fault", SPOILED)
def test_an_adapter_is_refused(fault, tiny_base, tmp_path, capsys, monkeypatch):
    spoil, message = SPOILED[fault]
    write_adapter(tmp_path / "adapter", base=str(tiny_base))
    spoil(tmp_path / "adapter")
    line = refused(infer, ["--adapter", "adapter", "--prompt", "a"], capsys, monkeypatch, tmp_path)
    assert_line(line, message)


QUESTIONS = {
    "--prompts_file q.jsonl": "q.jsonl, line 2: not JSON",
    "--prompts_file gbk.txt": "gbk.txt, line 1: not UTF-8",
    "--prompts_file long.txt --max_length 30": "--max_length 30 leaves no room for an answer to a prompt of ",
    "--prompt a --input b --prompts_file q.txt": "--input goes with --prompt",
    "--prompt \udcc4": r"--prompt '\udcc4' is not a text in UTF-8",
    "--prompt a --device cuda:7": "--device cuda:7: ",
}


@pytest.mark.parametrize("flags", QUESTIONS, ids=ascii)
def test_a_question_is_refused(flags, tiny_base, tmp_path, capsys, monkeypatch):
    write_adapter(tmp_path / "adapter", base=str(tiny_base))
    (tmp_path / "q.jsonl").write_text('{"prompt": "a"}\n{"prompt": ')
    (tmp_path / "gbk.txt").write_bytes("你好".encode("gbk"))
    (tmp_path / "long.txt").write_text("a\n" + "a" * 90)
    line = refused(infer, ["--adapter", "adapter", *flags.split()], capsys, monkeypatch, tmp_path)
    assert QUESTIONS[flags] in line


def test_a_run_is_written_over_only_when_that_is_asked_for(tiny_base, tmp_path, capsys, monkeypatch):
    (tmp_path / "rows.jsonl").write_bytes(jsonl(GOOD, GOOD, GOOD))
    argv = ["--model_name_or_path", tiny_base, "--dataset", "rows.jsonl", "--max_steps", "1", "--output_dir", "a/run"]
    monkeypatch.chdir(tmp_path)

    def run(*flags: str) -> None:
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv), *flags])
        with pytest.raises(SystemExit) as ended:
            run_command(train.main)
        assert ended.value.code == 0, capsys.readouterr().err
        capsys.readouterr()

    run()
    first = (tmp_path / "a/run/adapter_model.safetensors").read_bytes()
    state = json.loads((tmp_path / "a/run/trainer_state.json").read_text())
    assert state["step"] == 1 and state["arguments"]["output_dir"] == "a/run"
    assert_line(refused(train, [*argv, "--seed", "1"], capsys, monkeypatch, tmp_path), "--overwrite_output_dir")
    assert (tmp_path / "a/run/adapter_model.safetensors").read_bytes() == first
    run("--seed", "1", "--overwrite_output_dir")
    assert (tmp_path / "a/run/adapter_model.safetensors").read_bytes() != first
    run("--overwrite_output_dir")  # the same settings give the same bytes
    assert (tmp_path / "a/run/adapter_model.safetensors").read_bytes() == first
