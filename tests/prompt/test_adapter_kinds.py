"""Every entrance refuses adapters that are not soft prompts of a causal language model, and names their kind."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.adapters import write_adapter
from helpers.programs import refusal, run_infer
from safetensors.torch import save

import infer
import softprompt
import train
from softprompt import cli
from softprompt.export.plain_model import export
from softprompt.prompt.adapter_io import MAX_HEADER_BYTES, load_adapter
from softprompt.utils.errors import AdapterError

PROMPT = "prompt_embeddings"
TASKS = ["SEQ_CLS", "TOKEN_CLS", "SEQ_2_SEQ_LM", "QUESTION_ANS", "FEATURE_EXTRACTION", "causal_lm", 7]
KINDS = ["P_TUNING", "PREFIX_TUNING", "LORA", "MULTITASK_PROMPT_TUNING", "CPT", "OF_TOMORROW", None, ["LORA"]]


def changed(folder: Path, tensors: dict | None = None, **config) -> Path:
    """Change the configuration or the tensors of the adapter at `folder`."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if tensors is not None:
        (folder / "adapter_model.safetensors").write_bytes(save(tensors))
    return folder


@pytest.mark.parametrize("task", TASKS)
def test_other_tasks_are_refused(task, place):
    """The task is the reason, even if the tensor's shape is wrong, too (an encoder-decoder has two prompts)."""
    changed(place / "a", {PROMPT: torch.ones(6, 32)}, task_type=task, num_transformer_submodules=2)
    with pytest.raises(AdapterError, match=f"a/adapter_config.json: task_type is {task!r}, expected 'CAUSAL_LM'"):
        load_adapter("a")


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_are_refused(kind, place):
    changed(place / "a", peft_type=kind)
    with pytest.raises(AdapterError) as raised:
        load_adapter("a")
    assert f"peft_type is {kind!r}" in str(raised.value) and "'PROMPT_TUNING'" in str(raised.value)


def test_each_kind_is_refused_with_its_reason(place):
    reasons = set()
    for kind in KINDS[:6]:
        with pytest.raises(AdapterError) as raised:
            load_adapter(changed(place / "a", peft_type=kind))
        reasons.add(str(raised.value).replace(str(kind), ""))
    assert len(reasons) == 5  # LoRA and unknown kinds have the same one


@pytest.mark.parametrize(
    ("config", "named"),
    [({"num_transformer_submodules": 2}, "num_transformer_submodules"), ({"modules_to_save": ["lm_head"]}, "lm_head")],
)
def test_adapters_with_more_than_a_prompt_are_refused(config, named, place):
    with pytest.raises(AdapterError, match=named):
        load_adapter(changed(place / "a", **config))


@pytest.mark.parametrize("rows", [2, MAX_HEADER_BYTES // 32])
def test_a_tensor_beside_the_prompt_is_named_whatever_its_size(rows, place):
    changed(place / "a", {PROMPT: torch.ones(3, 32), "base_model.score.weight": torch.zeros(rows, 32)})
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors: holds base_model.score.weight beside"):
        load_adapter("a")


@pytest.mark.parametrize("header", [b"[]", b'"prompt_embeddings"', b"null", b"{", b"\xff"])
def test_a_broken_header_is_refused(header, place):
    content = len(header).to_bytes(8, "little") + header
    (place / "a" / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(AdapterError, match="not a whole safetensors file"):
        load_adapter("a")


@pytest.mark.parametrize("absent", ["task_type", "num_transformer_submodules", "modules_to_save"])
def test_fields_that_peft_allows_to_be_null_or_absent(absent, place):
    changed(place / "a", **{absent: None})
    assert load_adapter("a").prompt.shape == (3, 32)
    path = place / "a" / "adapter_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != absent}))
    assert load_adapter("a").prompt.shape == (3, 32)


def test_an_adapter_without_a_base_needs_model_name_or_path(place, tiny_base, capsys, monkeypatch):
    changed(place / "a", base_model_name_or_path="")
    argv = ["--adapter", "a", "--prompt", "好", "--max_new_tokens", "2"]
    line = refusal(infer, argv, capsys, monkeypatch)
    assert "names no base; give --model_name_or_path" in line
    run_infer([*argv, "--model_name_or_path", tiny_base], capsys, monkeypatch)
    export("a", "plain", model_name_or_path=str(tiny_base))
    assert (place / "plain" / "config.json").is_file()


def test_every_entrance_refuses_another_kind(place, tiny_base, capsys, monkeypatch):
    changed(place / "a", task_type="SEQ_CLS")
    (place / "rows.jsonl").write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n")
    (place / "p.jsonl").write_text(json.dumps({"prompt": "a", "adapter": "a"}) + "\n")
    of_train = ["--model_name_or_path", tiny_base, "--dataset", "rows.jsonl", "--init_adapter", "a"]
    programs = [
        (infer, [["--adapter", "a", "--prompt", "好"], ["--adapter", "b", "--prompts_file", "p.jsonl"]]),
        (train, [of_train]),
        (SimpleNamespace(__name__="export", main=cli.export), [["a", "--output", "plain"]]),
    ]
    for program, calls in programs:
        for argv in calls:
            assert "task_type is 'SEQ_CLS'" in refusal(program, argv, capsys, monkeypatch)
    with pytest.raises(AdapterError, match="SEQ_CLS"):
        softprompt.SoftPromptModel.from_pretrained(adapter="a")
    model = softprompt.SoftPromptModel.from_pretrained(adapter="b")
    with pytest.raises(AdapterError, match="SEQ_CLS"):
        model.load_adapter("a")
    assert list(model.adapters) == ["b"]


def test_none_is_the_bare_base_at_every_entrance(place, tiny_base, capsys, monkeypatch):
    for given in ({"none": "a"}, {"x": "b", "none": "a"}, {"": "a"}, ["none=a"]):
        with pytest.raises(AdapterError):
            softprompt.SoftPromptModel.from_pretrained(str(tiny_base), given)
    model = softprompt.SoftPromptModel.from_pretrained(str(tiny_base), {"x": "a", "none": "none"})
    assert model.adapters["none"].prompt is None
    for name in ("none", ""):
        with pytest.raises(AdapterError):
            model.load_adapter("b", name)
    assert model.adapters["none"].prompt is None and model.load_adapter("none") == "none"
    argv = ["--adapter", "x=b", "--adapter", "none=a", "--ensemble", "--prompt", "好"]
    assert "none=a" in refusal(infer, argv, capsys, monkeypatch)
    write_adapter(place / "none", tiny_base, 4)  # a folder of this name is given by its path
    assert softprompt.SoftPromptModel.from_pretrained(adapter="./none").prompt is not None
