"""A setting that does not exist is answered with the one that is meant, with a reason, or with nothing."""

import pytest

import softprompt
from softprompt.config.command_line import parse_inference, parse_training
from softprompt.config.infer_args import INFER_GROUPS
from softprompt.config.loader import GROUPS
from softprompt.config.schema import setting_types
from softprompt.config.unknown_names import ALIASES, OTHER_NAMES, advice
from softprompt.export.args import ExportArguments, parse_export
from softprompt.generation.requests import merge_settings
from softprompt.report.args import ReportArguments
from softprompt.study.grid import read_study
from softprompt.utils.errors import ConfigError

MEANT = {
    "--lr": "--learning_rate", "--LR": "--learning_rate", "--sed": "--seed", "--epochs": "--num_train_epochs",
    "--eval_batch_size": "--per_device_eval_batch_size", "--max-len": "--max_length", "--outputdir": "--output_dir",
    "--evaluation_strategy": "--eval_strategy", "--weight_decy": "--weight_decay", "--dataset_nam": "",
}  # fmt: skip
ELSEWHERE = {
    "--optim": "AdamW is the only optimizer", "--save_strategy": "--save_steps", "--dataloader_num_workers": "workers",
    "--revision": "download", "--fp16_full_eval": "--fp16", "--lora_r": "prompt tuning", "--deepspeed": "Trainer",
}  # fmt: skip
OF_TOOLS = {  # what train, infer, export and report are asked to suggest; "-": nothing
    "lr": "learning_rate -", "epochs": "num_train_epochs -", "batch_size": "per_device_train_batch_size",
    "bs": "per_device_train_batch_size batch_size", "model": "model_name_or_path model_name_or_path model_name_or_path",
    "base": "model_name_or_path model_name_or_path", "output": "output_dir output_file",
    "o": "output_dir output_file output",
    "out": "output_dir output_file output output_file", "max_len": "max_length max_length",
    "cutoff_len": "max_length max_length", "ckpt": "resume_from_checkpoint adapter", "temp": "- temperature",
    "checkpoint": "resume_from_checkpoint adapter", "tokens": "num_virtual_tokens max_new_tokens",
    "data": "dataset eval_dataset", "labels": "class_labels choices", "gpu": "device device",
    "val_size": "eval_rows -", "pre_seq_len": "num_virtual_tokens -", "qlora": "load_in_4bit load_in_4bit",
}  # fmt: skip
NOTHING = ["--top_n", "--fp32", "--steps_max", "--wandb", "--help_me", "--x", "--train_seeds", "--min_time"]


def fault(run, *args, **kwargs):
    with pytest.raises(ConfigError) as raised:
        run(*args, **kwargs)
    return str(raised.value)


def test_flags():
    for name, meant in MEANT.items():
        line = fault(parse_training, [name, "1"])
        assert line == f"unknown flag {name}" + (f"; did you mean {meant}?" if meant else ""), line
    for name, reason in ELSEWHERE.items():
        line = fault(parse_training, [name])
        assert reason in line and "did you mean" not in line
    for name in NOTHING:
        assert fault(parse_training, [name, "1"]) == f"unknown flag {name}"
    assert fault(parse_inference, ["--max_tokens", "1"]).endswith("did you mean --max_new_tokens?")
    assert fault(parse_export, ["a", "--out", "1"]).endswith("did you mean --output?")
    assert fault(parse_training, ["word"]) == "unknown argument word"


def test_the_same_in_files_and_in_python(tmp_path):
    (tmp_path / "c.toml").write_text("lr = 1\noptim = 'x'", encoding="utf-8")
    line = fault(parse_training, ["--config", str(tmp_path / "c.toml")])
    assert "did you mean learning_rate?" in line and "AdamW" in line
    line = fault(softprompt.train, lr=1, optim="x", top_n=3)
    assert "'lr'; did you mean learning_rate?; unknown setting 'optim'; AdamW" in line and line.endswith("'top_n'")
    line = fault(merge_settings, {}, {"max_tokens": 3, "temperature": 1.0})
    assert "'max_tokens'; did you mean max_new_tokens?" in line and "'temperature'" not in line
    (tmp_path / "s.toml").write_text("[settings]\nlr = 1\n[[grid]]\noptim = ['x']", encoding="utf-8")
    line = fault(read_study, tmp_path / "s.toml")
    assert "'lr'; did you mean learning_rate?" in line and "'optim'; AdamW" in line


def test_no_name_of_transformers_is_answered_with_another_setting():
    """But for other spellings of ours, every name of TrainingArguments has a reason or nothing."""
    import dataclasses

    from transformers import TrainingArguments

    ours = setting_types(GROUPS)
    for field in dataclasses.fields(TrainingArguments):
        if field.name not in {*ours, *ALIASES}:
            assert "did you mean" not in advice(field.name, ours), field.name


def test_names_of_common_tools_suggest_what_they_mean_here():
    """The same name may mean another setting for another command."""
    by_command = [setting_types(groups) for groups in (GROUPS, INFER_GROUPS, [ExportArguments], [ReportArguments])]
    for name, meant in OF_TOOLS.items():
        for known, setting in zip(by_command, meant.split(), strict=False):
            assert advice(name, known, "--") == (f"; did you mean --{setting}?" if setting != "-" else ""), name


def test_every_suggestion_is_a_setting_and_every_alias_is_none_somewhere():
    by_command = [setting_types(groups) for groups in (GROUPS, INFER_GROUPS, [ExportArguments])]
    assert set(OTHER_NAMES) <= set().union(*by_command)
    for name, settings in ALIASES.items():
        assert any(name not in known and set(settings) & set(known) for known in by_command), name
