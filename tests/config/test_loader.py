"""Settings: where each comes from, and every fault that is found in them before anything is loaded."""

import json
import re
from dataclasses import fields

import pytest

from softprompt.config.command_line import parse_inference, parse_training
from softprompt.config.infer_args import INFER_GROUPS
from softprompt.config.infer_config import generation_faults, infer_config
from softprompt.config.loader import GROUPS, PRESETS, default_settings, train_config
from softprompt.config.value_parsers import parse_columns
from softprompt.utils.errors import ConfigError

OWN = {"model_name_or_path": "some/base", "dataset": "rows.jsonl"}
ARTICLE = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 8,
    "logging_steps": 10,
    "num_train_epochs": 1.0,
    "max_steps": -1,
    "save_steps": 500,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "seed": 42,
    "max_length": 256,
    "truncation_side": "output",
    "num_virtual_tokens": None,  # told from "not given" to TEXT; else DEFAULT_NUM_VIRTUAL_TOKENS
}


@pytest.mark.parametrize("settings", [OWN, {"preset": "bloom-1b4-zh"}, {"preset": "article"}], ids=str)
def test_all_but_the_mini_preset_train_as_the_article_does(settings):
    found = train_config(**settings).as_dict()
    assert found.pop("prompt_tuning_init") == ("RANDOM" if "preset" in settings else "SAMPLE_VOCAB")
    assert {name: found[name] for name in ARTICLE} == ARTICLE
    assert found["learning_rate"] == (5e-5 if settings.get("preset") == "article" else None)


@pytest.mark.parametrize(
    "given, preset",
    [({}, "mini"), ({"dataset": "a"}, "mini"), (OWN, None), ({**OWN, "preset": "article"}, "article")],
    ids=str,
)
def test_which_preset_is_in_force(given, preset):
    config = train_config(**given)
    assert config.preset == preset
    assert {**(PRESETS[preset] if preset else {}), **given}.items() <= config.as_dict().items()


@pytest.mark.parametrize("preset", ["mini", "article"])
def test_rows_of_a_preset_are_no_questions_about_a_text(preset):
    assert train_config(preset=preset, distill_context="document.txt").data.dataset is None
    with pytest.raises(ConfigError, match="needs questions"):
        train_config(preset=preset, distill_prompt="system.txt")
    assert train_config(preset="distill-mini", distill_prompt="system.txt").data.dataset == "mini:reply"


def test_a_distillation_has_defaults_of_its_own():
    settings = train_config(**OWN, distill_prompt="system.txt").as_dict()
    known = default_settings(settings)
    assert all(known[name] == settings[name] for name in ("prompt_tuning_init", "num_virtual_tokens"))
    assert settings["num_virtual_tokens"] == 16 and default_settings(OWN)["num_virtual_tokens"] == 10
    assert settings["max_steps"] == known["max_steps"] == 120
    for given in ({"max_steps": 5}, {"num_train_epochs": 2.0}):
        chosen = train_config(**OWN, distill_prompt="system.txt", **given).training
        assert {"max_steps": -1, "num_train_epochs": 1.0, **given}.items() <= vars(chosen).items()
    started = train_config(**OWN, distill_prompt="system.txt", init_adapter="folder").as_dict()
    assert started["num_virtual_tokens"] is None and started["prompt_tuning_init"] == "SAMPLE_VOCAB"


@pytest.mark.parametrize("preset", ["mini", "bloom-1b4-zh"])
def test_a_distillation_with_a_preset_starts_from_its_text_and_needs_questions_of_its_own(preset):
    config = train_config(preset, distill_prompt="system.txt", dataset="questions.txt")
    assert (config.prompt.prompt_tuning_init, config.prompt.num_virtual_tokens) == ("TEXT", 16)
    assert default_settings(config.as_dict())["prompt_tuning_init"] == "TEXT"
    with pytest.raises(ConfigError, match="questions"):
        train_config(preset, distill_prompt="system.txt")
    given = train_config(preset, distill_prompt="system.txt", dataset="q.txt", prompt_tuning_init="RANDOM")
    assert given.prompt.prompt_tuning_init == "RANDOM"


@pytest.mark.parametrize("word_rms, of_words", [(0.1347, 0.03), (1.03, 0.2), (0.02, 0.004), (None, None)])
@pytest.mark.parametrize("init", ["RANDOM", "TEXT", "SAMPLE_VOCAB", "CLASS_LABELS"])
def test_the_learning_rate_suits_the_start_and_the_size_of_the_words(init, word_rms, of_words):
    texts = {"TEXT": "prompt_tuning_init_text", "CLASS_LABELS": "class_labels"}
    start = {"prompt_tuning_init": init, **({texts[init]: "a"} if init in texts else {})}
    assert train_config(**start).learning_rate(word_rms) == (0.3 if init == "RANDOM" else of_words)
    assert train_config(**start, learning_rate=1).learning_rate(word_rms) == 1.0
    assert train_config("article", **start).learning_rate(word_rms) == 5e-5


@pytest.mark.parametrize(("word_rms", "rate"), [(0.13, 0.02), (1.03, 0.2), (None, None)])
def test_distillation_has_a_smaller_learning_rate(word_rms, rate):
    settings = {"model_name_or_path": "x", "dataset": "x", "distill_prompt": "system.txt"}
    assert train_config(**settings).learning_rate(word_rms) == rate
    assert train_config(**settings, prompt_tuning_init="RANDOM").learning_rate(word_rms) == 0.3
    assert train_config(**settings, prompt_reparameterization="mlp").learning_rate(word_rms) == 0.003
    assert train_config(**settings, learning_rate=1).learning_rate(word_rms) == 1.0


@pytest.mark.parametrize("parse, groups", [(parse_training, GROUPS), (parse_inference, INFER_GROUPS)])
def test_help_shows_every_flag_once_with_its_default(parse, groups, capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    out = capsys.readouterr().out
    shown = [" ".join(text.split()) for text in re.split(r"^  (?=--)|^$", out, flags=re.M)]
    for group in groups:
        assert f"\n{group._argument_group_name}:\n" in out
        for f in fields(group):
            (text,) = (text for text in shown if text.startswith(f"--{f.name} "))
            if f.default is not None:
                assert f"(default: {str(f.default).lower()}" in text.lower()
            assert "(default: " in text


def test_flags_are_also_spelt_with_hyphens():
    argv = ["--learning-rate", "0.5", "--num-virtual-tokens=3", "--overwrite-output-dir", "--max-length", "9"]
    found = parse_training(argv).as_dict()
    wanted = {"learning_rate": 0.5, "num_virtual_tokens": 3, "overwrite_output_dir": True, "max_length": 9}
    assert wanted.items() <= found.items()


@pytest.mark.parametrize("flag", ["bf16", "fp16"])
@pytest.mark.parametrize("values, expected", [([], None), ([""], True), (["true"], True), (["false"], False)])
def test_precision_has_three_states(flag, values, expected):
    argv = [part for value in values for part in (f"--{flag}", value) if part]
    assert parse_training(argv).as_dict()[flag] is expected


def test_eval_steps_asks_for_evaluation():
    assert train_config(eval_steps=5).training.eval_strategy == "steps"
    assert train_config(eval_steps=5, eval_strategy="no").training.eval_strategy == "no"


@pytest.mark.parametrize("config", [train_config(), train_config("article"), train_config(**OWN, bf16=True)])
def test_all_settings_are_json_and_can_be_given_back(config):
    told = json.loads(json.dumps(config.as_dict()))
    assert train_config(**told) == config


@pytest.mark.parametrize(
    "text, pairs",
    [
        (None, {}),
        ("", {}),
        ("instruction=问题", {"instruction": "问题"}),
        (" instruction = q , output=a=b,", {"instruction": "q", "output": "a=b"}),
    ],
)
def test_columns(text, pairs):
    assert parse_columns(text) == pairs


FAULTS = [
    ({"bf16": True, "fp16": True}, "--bf16 and --fp16 exclude each other; give one of them"),
    ({"device": "tpu"}, "--device 'tpu' is not auto, cpu, cuda or cuda:N"),
    ({"device": "cuda:x"}, "--device 'cuda:x' is not auto"),
    ({"model_name_or_path": "", "preset": "article"}, "--model_name_or_path is empty; give it a value or leave it out"),
    ({"output_dir": ""}, "--output_dir is empty"),  # would be the current folder
    ({"eval_dataset": ""}, "--eval_dataset is empty"),
    ({"model_name_or_path": "some/base"}, "--dataset is missing; name the rows to train on"),
    ({"num_virtual_tokens": 0}, "--num_virtual_tokens 0 is below 1; a soft prompt needs at least one token"),
    ({"num_virtual_tokens": -1}, "--num_virtual_tokens -1 is below 1"),
    ({"prompt_tuning_init": "TEXT"}, "--prompt_tuning_init TEXT needs --prompt_tuning_init_text"),
    ({"prompt_tuning_init_text": "a"}, "--prompt_tuning_init_text is only used with --prompt_tuning_init TEXT"),
    ({"eval_dataset": "a", "eval_rows": 1}, "--eval_dataset and --eval_rows exclude each other"),
    ({**OWN, "eval_strategy": "epoch"}, "--eval_strategy epoch needs held-out rows; give --eval_dataset FILE or"),
    ({**OWN, "eval_steps": 3}, "--eval_steps 3 needs held-out rows"),
    *[
        ({name: value}, f"--{name} {value} must be above 0")
        for name in (
            *("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps", "save_steps"),
            *("per_device_eval_batch_size", "save_total_limit", "eval_steps"),
        )
        for value in (0, -1)
    ],
    ({"num_train_epochs": 0}, "--num_train_epochs 0.0 must be above 0"),
    *[({n: -1}, f"--{n} -1.0 must not be negative") for n in ("warmup_steps", "weight_decay", "max_grad_norm")],
    ({"adam_epsilon": -1.0}, "--adam_epsilon -1.0 must not be negative"),
    ({"adam_beta1": 1.0}, "--adam_beta1 1.0 must lie in [0, 1)"),
    ({"adam_beta2": -0.1}, "--adam_beta2 -0.1 must lie in [0, 1)"),
    ({"seed": -1}, "--seed -1 must lie in [0, 2**63)"),
    ({"seed": 2**64}, "must lie in [0, 2**63)"),
    ({"learning_rate": 0.0}, "--learning_rate 0.0 must be above 0"),
    ({"max_length": 1}, "--max_length 1 is too small to hold any target; give at least 2"),
    ({"eval_rows": -1}, "--eval_rows -1 must not be negative"),
    ({"columns": "output"}, "--columns 'output' is not a list of OURS=THEIRS pairs such as"),
    ({"columns": "=a"}, "--columns '=a' is not a list"),
    *[({name: float("inf")}, f"--{name} inf is not a finite number") for name in ("learning_rate", "num_train_epochs")],
    ({"weight_decay": float("nan")}, "--weight_decay nan is not a finite number"),
    ({"max_length": 2.5}, "--max_length 2.5 is not a whole number"),
    ({"max_length": True}, "--max_length True is not a whole number"),
    ({"bf16": "yes"}, "--bf16 'yes' is not true or false"),
    ({"dataset": 3}, "--dataset 3 is not a text"),
    ({"template": "\udcc4"}, r"--template '\udcc4' is not a text in UTF-8"),
    ({"truncation_side": "left"}, "--truncation_side 'left' is not one of output, input"),
    ({"num_virtual_token": 3}, "unknown setting 'num_virtual_token'; did you mean num_virtual_tokens?"),
    (
        {"preset": "articel"},
        "unknown preset 'articel', expected one of mini, distill-mini, bloom-1b4-zh, article; did you",
    ),
    ({"preset": 3}, "unknown preset 3"),
]


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("given, message", FAULTS, ids=[message[:40] for _, message in FAULTS])
def test_faults(given, message):
    with pytest.raises(ConfigError) as raised:
        train_config(**given)
    assert message in one_line(raised)


def test_what_lies_at_a_limit_is_no_fault():
    limits = {"max_length": 2, "adam_beta1": 0, "max_grad_norm": 0, "num_virtual_tokens": 1, "seed": 2**63 - 1}
    assert limits.items() <= train_config(**limits, num_train_epochs=0.01).as_dict().items()


@pytest.mark.parametrize(
    "given",
    [
        {"num_virtual_tokens": 0, "max_length": 0, "columns": "a", "device": "x", "learning_rate": -1.0},
        {"num_virtual_tokens": "a", "max_length": 0.5, "maxlength": 3},
    ],
    ids=["values", "types"],
)
def test_all_faults_are_in_the_one_message(given):
    with pytest.raises(ConfigError) as raised:
        train_config(**given)
    assert all(name in one_line(raised) for name in given)


TOML_FAULTS = [
    (None, "--config run.toml: No such file"),
    (b"a = = 1", "--config run.toml: not TOML: Invalid value (at line 1"),
    (b"a = " + b"[" * 20_000, "--config run.toml: not TOML: "),
    (b"template = 'chat'\nchat_template_date = 2026-01-31T10:00:00", "'2026-01-31T10:00:00' is not a date such as"),
    (b"chat_template_date = 2026-01-31", "--chat_template_date is only used with --template chat"),
    ("seed = 1 # 种子".encode("gbk"), "--config run.toml: not TOML: 'utf-8' codec can't decode"),
    (b"sed = 1\nmax_lenght = 3", "unknown setting 'sed'; did you mean seed?; unknown setting 'max_lenght'; did you"),
    (b"[training]\nseed = 1", "--config run.toml: unknown setting 'training'"),
    (b"seed = '1'", "--seed '1' is not a whole number"),
    (b"preset = ['mini']", "unknown preset ['mini'], expected one of"),
    (b"max_length = 1", "--max_length 1 is too small"),
]


@pytest.mark.parametrize("content, message", TOML_FAULTS, ids=[message[:30] for _, message in TOML_FAULTS])
def test_faults_of_a_config_file(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "run.toml").write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        parse_training(["--config", "run.toml"])
    assert message in one_line(raised)


def test_a_flag_mends_the_files_preset(tmp_path):
    (tmp_path / "run.toml").write_text('preset = "article"\nseed = 1', encoding="utf-8-sig")  # as Windows editors do
    found = parse_training(["--config", str(tmp_path / "run.toml"), "--preset", "mini"])
    assert (found.preset, found.training.seed) == ("mini", 1)


FLAG_FAULTS = [
    (["--learning_rat", "1"], "unknown flag --learning_rat; did you mean --learning_rate?"),
    (["--max_len=3"], "unknown flag --max_len; did you mean --max_length?"),  # no abbreviations
    (["--zzz"], "unknown flag --zzz"),
    (["stray"], "unknown argument stray"),
    (["--seed"], "--seed: expected one argument"),
    (["--template", "-{a}"], "write one that starts with - as --template=VALUE"),
    (["--max-length", "long"], "--max_length: invalid int value: 'long'"),
    (["--bf16", "perhaps"], "--bf16: 'perhaps' is neither true nor false"),
    (["--truncation_side", "left"], "--truncation_side: invalid choice: 'left' (choose from 'output', 'input')"),
]


@pytest.mark.parametrize("argv, message", FLAG_FAULTS, ids=[" ".join(argv) for argv, _ in FLAG_FAULTS])
def test_faults_of_flags(argv, message):
    with pytest.raises(ConfigError) as raised:
        parse_training(argv)
    assert message in one_line(raised)


INFER_FAULTS = [
    ({"prompt": "a", "prompts_file": "b"}, "give either --prompt"),
    ({"prompts_file": "b", "input": "c"}, "--input goes with --prompt; in a --prompts_file it is a column"),
    ({"prompt": "a", "bf16": True, "fp16": True}, "--bf16 and --fp16 exclude each other"),
    ({"prompt": "a", "device": "gpu"}, "--device 'gpu' is not auto"),
    ({"prompt": "a", "beams": 2}, "unknown setting 'beams'"),
    ({"prompt": 3}, "--prompt 3 is not a text"),
    *[({"prompt": "a", n: 0}, f"--{n} 0 must be at least 1") for n in ("max_length", "max_new_tokens", "batch_size")],
    ({"prompt": "a", "top_k": -1}, "--top_k -1 must be at least 0"),
    ({"prompt": "a", "seed": -1}, "--seed -1 must lie in [0, 2**63)"),
    *[({"prompt": "a", n: 0.0}, f"--{n} 0.0 must be above 0") for n in ("temperature", "repetition_penalty")],
    ({"prompt": "a", "top_p": 0.0}, "--top_p 0.0 must lie above 0 and must not exceed 1"),
    ({"prompt": "a", "top_p": 1.1}, "--top_p 1.1 must lie above 0"),
    ({"prompt": "a", "temperature": float("inf")}, "--temperature inf is not a finite number"),
]


@pytest.mark.parametrize("given, message", INFER_FAULTS, ids=[message[:40] for _, message in INFER_FAULTS])
def test_faults_of_a_question(given, message):
    with pytest.raises(ConfigError) as raised:
        infer_config(**given)
    assert message in one_line(raised)


def test_a_question_without_faults():
    limits = {"top_k": 0, "top_p": 1, "max_length": 1, "seed": 0, "input": "", "prompt": "a"}
    assert infer_config(**limits).generation.max_new_tokens is None


@pytest.mark.parametrize(
    "saved", [{"temperature": "hot"}, {"do_sample": 1}, {"max_length": 2.5}, {"top_k": [1]}, {"seed": "a"}], ids=str
)
def test_saved_settings_of_another_type_are_faults(saved):
    (name,) = saved
    assert [fault.split()[0] for fault in generation_faults(saved)] == [f"--{name}"]


@pytest.mark.parametrize("flags", [["--buffer_size", "9"], ["--streaming"], ["--offload_folder", "x"]], ids=" ".join)
def test_what_a_checkpoint_may_say_is_not_asked_of_flags(flags):
    """Whether it streams its rows or its base, and which rows these are."""
    parse_training(["--resume_from_checkpoint", "run", *flags])
    with pytest.raises(ConfigError):
        parse_training(flags)
