"""A setting that does not exist is answered with the one that is meant, with a reason, or with nothing."""

import pytest

import softprompt
from softprompt.config.command_line import parse_inference, parse_training
from softprompt.config.loader import GROUPS
from softprompt.config.schema import setting_types
from softprompt.config.unknown_names import ALIASES, SECOND, advice
from softprompt.export.args import parse_export
from softprompt.generation.requests import merge_settings
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
        if field.name not in {*ours, *ALIASES, *SECOND}:
            assert "did you mean" not in advice(field.name, ours), field.name
    assert set(ALIASES) - set(ours) == set(ALIASES)
