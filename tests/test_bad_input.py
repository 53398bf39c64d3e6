"""Every bad input that a newcomer may give: exit code 2, one clear line, no traceback, nothing written."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers.adapters import write_adapter
from helpers.bases import make_bloom
from helpers.programs import GOOD, assert_line, jsonl, listing, refused
from safetensors.torch import save

import infer
import softprompt
import train
from softprompt.config.loader import train_config
from softprompt.data.build_data import read_rows
from softprompt.data.dataset import question
from softprompt.data.template import Template
from softprompt.generation.adapters import LoadedAdapter
from softprompt.prompt.adapter_folder import adapter_files, peft_config
from softprompt.prompt.adapter_io import Adapter
from softprompt.utils.atomic_io import write_folder
from softprompt.utils.errors import AdapterError, ConfigError, DataError, SoftpromptError

# ruff: noqa: E501 (a table reads best with a case a line)
BROKEN_FILES = {
    "missing": ("rows.jsonl", None, "rows.jsonl: no such file"),
    "empty": ("rows.jsonl", b"", "rows.jsonl is empty"),
    "blank": ("rows.json", b" \n\n", "rows.json is empty"),
    "no rows": ("rows.json", b"[]", "rows.json holds no rows"),
    "not JSON": ("rows.jsonl", b"hello", "rows.jsonl, line 1: not JSON"),
    "list not closed": ("rows.json", b'[{"instruction": "a"', "rows.json, line 1: not JSON"),
    "a broken line in the middle": (
        "rows.jsonl",
        jsonl(GOOD, '{"instruction": "a', GOOD),
        "rows.jsonl, line 2: not JSON",
    ),
    "not an object": (
        "rows.jsonl",
        jsonl(GOOD, "7"),
        "rows.jsonl, line 2: expected an object of columns, found a number",
    ),
    "without output": (
        "rows.jsonl",
        jsonl(GOOD, {"instruction": "a"}),
        "line 2: column 'output' must be a text, but there is none",
    ),
    "output null": (
        "rows.jsonl",
        jsonl({**GOOD, "output": None}),
        "line 1: column 'output' must be a text, found null",
    ),
    "output a number": (
        "rows.json",
        jsonl(json.dumps([GOOD, {**GOOD, "output": 3}])),
        "row 2: column 'output' .* a number",
    ),
    "output a list": ("rows.jsonl", jsonl({**GOOD, "output": ["a"]}), "line 1: column 'output' .* found a list"),
    "instruction a number": ("rows.jsonl", jsonl({**GOOD, "instruction": 1}), "column 'instruction' .* found a number"),
    "wrong encoding": ("rows.jsonl", jsonl(GOOD) + "\n你好".encode("gbk"), "rows.jsonl, line 2: not UTF-8"),
    "csv with a field too many": (
        "rows.csv",
        b"instruction,output\na,b\na,b,c\n",
        "line 3: 3 fields where the header names 2",
    ),
    "csv with a field too few": ("rows.csv", b"instruction,output\na\n", "line 2: 1 fields where the header names 2"),
    "another kind of file": ("rows.txt", b"hello", "expected a file ending in .json, .jsonl, .csv, .parquet"),
    "not parquet": ("rows.parquet", b"hello", "rows.parquet: not a parquet file"),
}


@pytest.mark.parametrize("fault", BROKEN_FILES)
def test_broken_datasets(fault, tiny_base, tmp_path, capsys, monkeypatch):
    name, content, message = BROKEN_FILES[fault]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    argv = ["--model_name_or_path", tiny_base, "--dataset", name]
    assert_line(refused(train, argv, capsys, monkeypatch, tmp_path), message)


def test_folders_that_are_no_datasets(tiny_base, tmp_path, capsys, monkeypatch):
    (tmp_path / "folder").mkdir()
    argv = ["--model_name_or_path", tiny_base, "--dataset", "folder"]
    assert_line(refused(train, argv, capsys, monkeypatch, tmp_path), "expected a folder of Dataset.save_to_disk")
    Dataset.from_dict({"instruction": [], "output": []}).save_to_disk(tmp_path / "empty")
    capsys.readouterr()
    argv[-1] = "empty"
    assert_line(refused(train, argv, capsys, monkeypatch, tmp_path), "empty: expected a folder .* that holds rows")


LONG = {**GOOD, "instruction": "很长的问题" * 10}
FLAGS = {
    "--max_length 20": "no row keeps a target at --max_length 20.*give --max_length",
    "--max_length 1": "--max_length 1 is too small to hold any target",
    "--columns output=answer": "--columns maps output to 'answer', but the columns are 'instruction', 'input', 'output'",
    "--columns nonsense": "is not a list of OURS=THEIRS pairs",
    "--num_virtual_tokens 0": "--num_virtual_tokens 0 is below 1",
    "--num_virtual_tokens -1": "--num_virtual_tokens -1 is below 1",
    "--num_virtual_tokens ten": "--num_virtual_tokens: invalid int value: 'ten'",
    "--prompt_tuning_init TEXT": "TEXT needs --prompt_tuning_init_text",
    "--prompt_tuning_init ZERO": "invalid choice: 'ZERO'.*RANDOM",
    "--preset tiny": "unknown preset 'tiny', expected one of mini, distill-mini, bloom-1b4-zh, article",
    "--learning_rat 1": "unknown flag --learning_rat; did you mean --learning_rate",
    "--bf16 --fp16": "--bf16 and --fp16 exclude each other",
    "--device cuda:01": "--device 'cuda:01' is not auto, cpu, cuda",
    "--num_train_epochs 1e308": "--num_train_epochs 1e.308 must be at most 100,000",
    "--max_steps 9999999999": "--max_steps 9999999999 must be at most 1,000,000,000",
    "--num_virtual_tokens 1000000": "--num_virtual_tokens 1000000 must be at most 100,000",
    "--tokens_per_microbatch 0": "--tokens_per_microbatch 0 must be above 0",
    "--tokens_per_microbatch few": "--tokens_per_microbatch: invalid int value: 'few'",
    "--engine paked": "--engine: invalid choice: 'paked'.*packed",
    "--max_time soon": "--max_time 'soon' .*3h30m",
    "--resume_from_checkpoint nothing": "--resume_from_checkpoint nothing: no checkpoint there; name a run or a checkpoint",
    "--config twice.toml": "--config twice.toml: dry-run .*twice",
    "--device tpu": "--device 'tpu' is not auto, cpu, cuda",
    "--eval_rows 3": "--eval_rows 3 leaves none of the 3 rows",
    "--eval_strategy steps": "needs held-out rows; give --eval_dataset FILE or --eval_rows N",
    "--learning_rate 0": "--learning_rate 0.0 must be above 0",
    "--per_device_train_batch_size 0": "--per_device_train_batch_size 0 must be above 0",
    "--template nothing": "--template 'nothing' must be `chat` or hold columns as plain names",
    "--template {instruction.__class__}": "must be `chat` or hold columns as plain names",
    "--template {question}": "line 1: column 'question' must be a text, but there is none",
    "--template chat": "tokenizer has no chat template",
    "--config none.toml": "--config none.toml: No such file",
    "--config bad.toml": "--config bad.toml: not TOML",
    "--config odd.toml": "--config odd.toml: unknown setting 'num_virtual_token'; did you mean num_virtual_tokens",
    "--output_dir rows.jsonl": "rows.jsonl is not a folder",
    "--output_dir rows.jsonl/run": "rows.jsonl is not a folder",
    "--output_dir old": "--output_dir old holds a run already.*--overwrite_output_dir",
    "--init_adapter nothing": "adapter nothing: no such folder",
    "--init_adapter other": "virtual tokens have size 16, but .* has hidden size 32",
    "stray": "unknown argument stray",
}


@pytest.mark.parametrize("flags", FLAGS)
def test_bad_flags(flags, tiny_base, tmp_path, capsys, monkeypatch):
    (tmp_path / "rows.jsonl").write_bytes(jsonl(LONG, LONG, LONG))
    (tmp_path / "bad.toml").write_text("a = = b")
    (tmp_path / "odd.toml").write_text("num_virtual_token = 3")
    (tmp_path / "twice.toml").write_text("dry-run = true\ndry_run = false")
    (tmp_path / "old" / "checkpoint-5").mkdir(parents=True)
    write_adapter(tmp_path / "other", hidden_size=16)
    argv = ["--model_name_or_path", tiny_base, "--dataset", "rows.jsonl", *flags.split()]
    assert_line(refused(train, argv, capsys, monkeypatch, tmp_path), FLAGS[flags])


def test_all_faults_are_told_at_once(tmp_path, capsys, monkeypatch):
    argv = ["--num_virtual_tokens", "0", "--bf16", "--fp16", "--max_length", "0"]
    line = refused(train, argv, capsys, monkeypatch, tmp_path)
    assert all(flag in line for flag in ("--num_virtual_tokens", "--bf16", "--max_length"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_cuda_where_there_is_none(device, tmp_path, capsys, monkeypatch):
    line = refused(train, ["--device", device], capsys, monkeypatch, tmp_path)
    assert_line(line, f"--device {device}: torch finds no CUDA device here; use --device cpu")


def test_an_output_dir_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    """A place where even root can make no file."""
    line = refused(train, ["--output_dir", "/proc/run"], capsys, monkeypatch, tmp_path)
    assert_line(line, "--output_dir /proc/run: /proc cannot be written to")


def no_folder(base: Path) -> None:
    shutil.rmtree(base)


def no_weights(base: Path) -> None:
    (base / "model.safetensors").unlink()


def cut_weights(base: Path) -> None:
    whole = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def no_tokenizer(base: Path) -> None:
    for path in base.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize("spoil", [no_folder, no_weights, cut_weights, no_tokenizer])
def test_bases_that_cannot_be_loaded(spoil, tiny_base, tmp_path, capsys, monkeypatch):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    spoil(base)
    (tmp_path / "rows.jsonl").write_bytes(jsonl(GOOD))
    line = refused(train, ["--model_name_or_path", base, "--dataset", "rows.jsonl"], capsys, monkeypatch, tmp_path)
    told = {no_folder: f"base model '{base}': no such folder .looked for {base}.", no_tokenizer: f"tokenizer '{base}'"}
    assert_line(line, told.get(spoil, f"base model '{base}' cannot be loaded: .*; check its files, or give --model"))


@pytest.mark.parametrize("program, more", [(train, ["--dataset", "rows.jsonl"]), (infer, ["--adapter", "adapter"])])
@pytest.mark.parametrize("name", ["some/base", "./base", "a/b/c"])
def test_a_base_that_is_not_there_is_said_and_where_it_was_looked_for(
    name, program, more, tmp_path, capsys, monkeypatch
):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "rows.jsonl").write_bytes(jsonl(GOOD))
    write_adapter(tmp_path / "adapter", base=name)
    more = [*more, "--model_name_or_path", name] if program is train else [*more, "--prompt", "a"]
    line = refused(program, more, capsys, monkeypatch, tmp_path)
    place = (tmp_path / name).resolve()
    hub = f"base model 'some/base' cannot be loaded, neither from the folder {place}, which is not there, nor from the hub: "
    assert_line(line, hub if name == "some/base" else f"base model '{name}': no such folder .looked for {place}.")


def test_no_hub(tmp_path, capsys, monkeypatch):
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    ways = "name a local folder or file, or run the default preset"
    line = refused(train, ["--dataset", "some/rows"], capsys, monkeypatch, tmp_path)
    assert_line(line, f"dataset 'some/rows'.*{ways}")
    (tmp_path / "rows.jsonl").write_bytes(jsonl(GOOD))
    argv = ["--model_name_or_path", "some/base", "--dataset", "rows.jsonl"]
    assert_line(refused(train, argv, capsys, monkeypatch, tmp_path), f"'some/base' cannot be loaded.*{ways}")


def test_the_hub_is_asked_once_and_then_left_alone(monkeypatch):
    import datasets
    from huggingface_hub import constants

    from softprompt.utils import hub

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    hub.check_reachable.cache_clear()
    hub.check_reachable()
    assert constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE
    assert "no answer from http://127.0.0.1:9: " in hub.advice() and hub.HELP in hub.advice()
    hub.check_reachable.cache_clear()


def test_why_the_hub_failed_is_told(tmp_path, capsys, monkeypatch):
    import datasets
    import huggingface_hub.utils
    from huggingface_hub import constants

    from softprompt.utils import hub

    class Session:
        def head(self, *args, **kwargs):
            raise OSError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.utils, "get_session", Session)
    hub.check_reachable.cache_clear()
    line = refused(train, ["--dataset", "some/rows"], capsys, monkeypatch, tmp_path)
    assert "CERTIFICATE_VERIFY_FAILED" in line and "SSL_CERT_FILE" in line
    monkeypatch.setattr(hub, "_failure", None)
    hub.check_reachable.cache_clear()


ADAPTERS = {
    "missing": (shutil.rmtree, "no such folder"),
    "without its weights": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        "adapter_model.safetensors is missing; an adapter folder holds .*: copy the whole folder again",
    ),
    "without its config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    "truncated": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"12"),
        "not a whole safetensors file .*; copy the whole",
    ),
    "foreign": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(save({"w": torch.ones(2)})),
        "holds w, expected one tensor 'prompt_embeddings'; give an adapter folder that PEFT or train.py",
    ),
    "of another hidden size": (lambda f: write_adapter(f, hidden_size=16), "have size 16, but .* has hidden size 32"),
    "of another kind": (
        lambda f: spoil_json(f / "adapter_config.json", peft_type="LORA"),
        "peft_type is 'LORA', expected 'PROMPT_TUNING': it changes the layers of the base",
    ),
    "with a base that is no name": (
        lambda f: spoil_json(f / "adapter_config.json", base_model_name_or_path=3),
        "base_model_name_or_path is 3, which is not a name or path; correct it, or set it to null and give --model_name",
    ),
    "with a size that is none": (
        lambda f: spoil_json(f / "adapter_config.json", token_dim="many"),
        "token_dim is 'many', expected an integer from 1 to .*; copy the whole folder again",
    ),
    "of another size than it says": (
        lambda f: spoil_json(f / "adapter_config.json", num_virtual_tokens=7),
        r"float32 \(3, 32\), but adapter_config.json says \(7, 32\) of floats; copy the whole folder again",
    ),
    "not JSON": (
        lambda f: (f / "softprompt.json").write_text("{"),
        "cannot be read as JSON: .*; copy the whole folder",
    ),
    "a list": (lambda f: (f / "softprompt.json").write_text("[]"), "expected an object of settings; copy the whole"),
    "with generation settings that are none": (
        lambda f: spoil_json(f / "softprompt.json", generation=[1]),
        r"generation must be an object of settings .*, not \[1\]; correct it, or take it out",
    ),
    "with a bad template": (
        lambda f: (f / "softprompt.json").write_text('{"template": "{a.b}"}'),
        "must be `chat` or hold columns as plain names.*; correct it there, or take it out",
    ),
}


def spoil_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("fault", ADAPTERS)
def test_broken_adapters(fault, tiny_base, tmp_path, capsys, monkeypatch):
    spoil, message = ADAPTERS[fault]
    write_adapter(tmp_path / "adapter")
    spoil(tmp_path / "adapter")
    argv = ["--adapter", "adapter", "--model_name_or_path", tiny_base, "--prompt", "你好"]
    assert_line(refused(infer, argv, capsys, monkeypatch, tmp_path), message)


QUESTIONS = {
    "": "give either --prompt",
    "--prompt a --prompts_file b.txt": "give either --prompt",
    "--prompt a --adapter adapter --max_length 3": "--max_length 3 leaves no room for an answer",
    "--prompt=": "--prompt is empty; write a question",
    "--prompt a --temperature 0": "--temperature 0.0 must be above 0",
    "--prompt a --do_sample true --temperature 1e-40": "--temperature 1e-40 is below 0.001; `--do_sample false` takes",
    "--prompt a --top_p 2": "--top_p 2.0 must lie above 0",
    "--prompts_file none.txt --adapter adapter": "none.txt: no such file",
    "--prompts_file rows.csv --adapter adapter": "expected a .txt or a .jsonl",
    "--prompts_file empty.txt --adapter adapter": "empty.txt is empty",
    "--prompts_file bad.jsonl --adapter adapter": "bad.jsonl, line 2: column 'instruction' must be a text, but there is none",
    "--prompt a": "no trained adapter under runs/; run `python train.py` first",
    "--promt a": "unknown flag --promt; did you mean --prompt",
}


@pytest.mark.parametrize("flags", QUESTIONS)
def test_bad_questions(flags, tiny_base, tmp_path, capsys, monkeypatch):
    write_adapter(tmp_path / "adapter", base=str(tiny_base))
    (tmp_path / "rows.csv").write_text("prompt\na\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bad.jsonl").write_bytes(jsonl({"prompt": "a"}, {"text": "b"}))
    assert_line(refused(infer, flags.split(), capsys, monkeypatch, tmp_path), QUESTIONS[flags])


@pytest.fixture
def bare(tiny_base):
    return softprompt.SoftPromptModel.from_pretrained(str(tiny_base), "none")


FROM_PYTHON = {
    "batch_size below 1": (["a", "b"], {"batch_size": -1}, "--batch_size -1 must be at least 1"),
    "batch_size of another kind": (["a"], {"batch_size": 1.5}, "--batch_size 1.5 is not a whole number"),
    "a seed that is none": (["a"], {"seed": "x"}, "--seed 'x' is not a whole number"),
    "half a character": (["a", "\ud800"], {}, "question 2 is neither a text nor a row"),
    "a number": ([5], {}, "question 1 is neither a text nor a row: 5"),
}


@pytest.mark.parametrize("fault", FROM_PYTHON)
def test_bad_questions_from_python(fault, bare):
    prompts, settings, message = FROM_PYTHON[fault]
    with pytest.raises(SoftpromptError, match=message):
        bare.generate(prompts, do_sample=False, max_new_tokens=2, **settings)


def test_no_questions_no_answers(bare):
    assert bare.generate([]) == []


def test_auto_is_as_good_as_not_given(bare):
    assert bare.settings(top_k="auto", do_sample="auto") == bare.settings()


def test_a_question_without_a_token(bare):
    asked = softprompt.SoftPromptModel(bare.base, bare.tokenizer, None, Template("{q}"))
    with pytest.raises(ConfigError, match="question 1 is empty"):
        asked.generate("")


def test_a_dry_run_from_python_does_not_train(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="dry_run=True trains nothing"):
        softprompt.train(dry_run=True)
    assert not listing(tmp_path)


@pytest.mark.parametrize("generation", [[1], "abc", {"max_length": None}, {"max_length": "auto"}, {"max_length": "x"}])
def test_bad_generation_settings_beside_an_adapter(generation, tiny_base, tmp_path, capsys, monkeypatch):
    write_adapter(tmp_path / "adapter", base=str(tiny_base))
    (tmp_path / "adapter/softprompt.json").write_text(json.dumps({"generation": generation}))
    argv = ["--adapter", "adapter", "--model_name_or_path", tiny_base, "--prompt", "你好"]
    assert_line(
        refused(infer, argv, capsys, monkeypatch, tmp_path),
        "generation must be|--max_length 'x' is not",
    )


def test_a_mini_task_is_checked_against_the_template_too(tmp_path):
    with pytest.raises(DataError, match="mini:sentiment, row 1: column 'nope' must be a text, but there is none"):
        read_rows(train_config("mini", template="{nope}", output_dir=str(tmp_path)), Template("{nope}"))


@pytest.mark.parametrize(
    "settings, fault",
    [({"template": 5}, "template 5 is not a text"), ({"generation": {"top_k": "x"}}, "--top_k 'x' is not")],
)
def test_what_stands_beside_an_adapter_is_named_by_its_file(settings, fault, tmp_path):
    folder = tmp_path / "adapter"
    prompt = torch.zeros(2, 32)
    config = peft_config("mini", make_bloom().config, prompt, "RANDOM")
    write_folder(folder, adapter_files(Adapter(prompt, config, settings)))
    with pytest.raises(AdapterError, match=re.escape(f"{folder / 'softprompt.json'}: {fault}")):
        LoadedAdapter.from_folder(folder)


def test_an_empty_question_of_a_file_is_refused():
    with pytest.raises(DataError, match="line 2: prompt is empty; write a question"):
        question("q.jsonl, line 2", {"prompt": " "}, Template())
