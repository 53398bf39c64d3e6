"""Bases that no prompt can be learned for are refused by their configuration alone: by every program, before rows are
read, with the reason and nothing about a hub."""

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.adapters import write_adapter, write_adapter_for
from helpers.bases import make_bloom
from helpers.programs import GOOD, assert_line, jsonl, refused
from helpers.quantized import configure
from helpers.small_bases import small_base
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    CLIPConfig,
    CpmAntConfig,
    DistilBertConfig,
    T5Config,
)

import infer
import softprompt
import train
from softprompt import cli
from softprompt.config.loader import train_config
from softprompt.models.loading import load_base, read_base
from softprompt.training.dry_run import dry_run
from softprompt.utils.errors import DataError, ModelError

QUANTIZED = {  # configuration of a quantized base whose method needs a library that is not installed here
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4},
    "compressed-tensors": {"quant_method": "compressed-tensors"},
    "quanto": {"quant_method": "quanto", "weights": "int8"},
    "torchao": {"quant_method": "torchao", "quant_type": "int4_weight_only"},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "FP8"},  # transformers does not know it
}
OTHERS = {
    "t5": (T5Config(d_model=8, num_layers=1), "an encoder and a decoder"),
    "bart": (BartConfig(d_model=8, encoder_layers=1, decoder_layers=1), "an encoder and a decoder"),
    "bert": (BertConfig(hidden_size=8, num_hidden_layers=1), "is an encoder"),
    "distilbert": (DistilBertConfig(dim=8, n_layers=1, n_heads=1), "is an encoder"),
    "clip": (CLIPConfig(), "no causal language model"),
    "wombat": (None, "`wombat`.*does not recognize this architecture"),
}


def hide_libraries(monkeypatch):
    """Let transformers find none of the libraries of quantization methods, whatever is installed."""
    import transformers.quantizers.auto  # noqa: F401

    modules = [m for name, m in sys.modules.items() if name.startswith("transformers.quantizers.quantizer_")]
    for module in modules:
        for name in [name for name in vars(module) if re.fullmatch(r"is_\w+_available", name)]:
            if name != "is_torch_available":
                monkeypatch.setattr(module, name, lambda *_: False)


@pytest.fixture
def unfit(request, tiny_base, tmp_path, monkeypatch) -> Path:
    """A folder with a tokenizer and weights, and the configuration of something else."""
    folder = Path(shutil.copytree(tiny_base, tmp_path / "unfit"))
    config = json.loads((folder / "config.json").read_text())
    if request.param in QUANTIZED:
        config["quantization_config"] = QUANTIZED[request.param]
        hide_libraries(monkeypatch)
    else:
        other = OTHERS[request.param][0]
        config = other.to_dict() if other else {"model_type": request.param}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def reason(kind: str) -> str:
    return rf"stored quantized \({kind}\), and .*the unquantized base" if kind in QUANTIZED else OTHERS[kind][1]


EACH = pytest.mark.parametrize("unfit", [*QUANTIZED, *OTHERS], indirect=True)


@EACH
def test_training_says_so_before_it_reads_rows(unfit, request, tmp_path, capsys, monkeypatch):
    kind = request.node.callspec.params["unfit"]
    argv = ["--model_name_or_path", unfit, "--dataset", "none.jsonl"]  # rows would be missed next
    for more in ([], ["--dry_run"]):
        line = refused(train, [*argv, *more], capsys, monkeypatch, tmp_path)
        assert_line(line, reason(kind))
        assert "hub" not in line and "HF_" not in line


@EACH
def test_the_other_programs_say_so_too(unfit, request, tmp_path, capsys, monkeypatch):
    kind = request.node.callspec.params["unfit"]
    write_adapter(tmp_path / "adapter", unfit, 2)
    (tmp_path / "study.toml").write_text(
        f'title = "x"\n[[grid]]\nmodel_name_or_path = "{unfit}"\ndataset = "none.jsonl"\neval_rows = 1\n'
    )
    commands = {
        cli.infer: ["--adapter", "adapter", "--prompt", "a"],
        cli.export: ["adapter", "--output", "out"],
        cli.study: ["study.toml"],
    }
    for program, argv in commands.items():
        line = refused(SimpleNamespace(main=program, __name__="softprompt"), argv, capsys, monkeypatch, tmp_path)
        assert_line(line, reason(kind))
        assert "hub" not in line and "HF_" not in line


@pytest.mark.parametrize("unfit", ["compressed-tensors", "t5"], indirect=True)
def test_from_python(unfit, request, tmp_path):
    told = reason(request.node.callspec.params["unfit"])
    config = {"model_name_or_path": str(unfit), "dataset": str(tmp_path / "none.jsonl")}
    for call in (
        lambda: softprompt.train(**config),
        lambda: dry_run(train_config(**config)),
        lambda: softprompt.SoftPromptModel.from_pretrained(str(unfit), "none"),
    ):
        with pytest.raises(ModelError, match=told):
            call()


@pytest.mark.parametrize("flag", ["--stream_base", "--load_in_8bit"])
@pytest.mark.parametrize("unfit", ["gptq"], indirect=True)
def test_no_flag_hides_the_reason(unfit, flag, tmp_path, capsys, monkeypatch):
    argv = ["--model_name_or_path", unfit, "--dataset", "none.jsonl", flag]
    assert_line(refused(train, argv, capsys, monkeypatch, tmp_path), reason("gptq"))


def test_a_base_that_fits_is_not_refused(tiny_base, tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl"):
        softprompt.train(model_name_or_path=str(tiny_base), dataset=str(tmp_path / "none.jsonl"))


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_a_base_without_any_quantized_weight_is_not_taken_for_a_quantized_one(method, tmp_path):
    """transformers 5.24 loads it without a word."""
    small_base("llama").save_pretrained(tmp_path)
    configure(tmp_path, quantization_config={"quant_method": method})
    with pytest.raises(
        ModelError, match=rf"its weights are stored quantized \({method}\), and none of them is; remove"
    ):
        read_base(str(tmp_path))


def test_a_base_that_takes_no_embeddings_is_refused(tokenizer, tmp_path, capsys, monkeypatch):
    """Only its forward shows it, so its weights are loaded first."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "dim_head": 8, "dim_ff": 48, "num_hidden_layers": 1}
    base = AutoModelForCausalLM.from_config(CpmAntConfig(vocab_size=300, **sizes))
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_bytes(jsonl(GOOD, GOOD, GOOD))
    write_adapter(tmp_path / "adapter", tmp_path / "base", 2)
    told = "base: CpmAntForCausalLM takes no inputs_embeds, so no soft prompt can precede its words; take another base"
    argv = ["--model_name_or_path", "base", "--dataset", "rows.jsonl"]
    for more in ([], ["--dry_run"], ["--engine", "packed"]):
        assert_line(refused(train, [*argv, *more], capsys, monkeypatch, tmp_path), told)
    argv = ["--adapter", "adapter", "--prompt", "a"]
    assert_line(refused(infer, argv, capsys, monkeypatch, tmp_path), told)


@pytest.mark.parametrize("kind", ["stablelm", "mpt", "llama4_text"])
def test_the_packed_engine_is_refused_where_it_cannot_be(kind, tokenizer, tmp_path, capsys, monkeypatch):
    """The line says what differed, or why the base cannot be run in this way."""
    base = small_base(kind)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_bytes(jsonl(*[{**GOOD, "instruction": "long enough" * n} for n in (1, 3, 2)]))
    write_adapter_for(tmp_path / "adapter", base, str(tmp_path / "base"), 2)
    told = {  # by train.py, and by infer.py
        "stablelm": ["it cannot run this base .StableLm.* no keyword arguments", "StableLm.* no keyword arguments"],
        "mpt": ["MptForCausalLM computes attention without transformers' attention interface"] * 2,
        "llama4_text": ["gradient off by .*loss by", "Llama4ForCausalLM: logits of decoding steps differ by"],
    }
    argv = ["--model_name_or_path", "base", "--dataset", "rows.jsonl", "--engine", "packed"]
    for more in ([], ["--dry_run"]):
        line = refused(train, [*argv, *more], capsys, monkeypatch, tmp_path)
        assert_line(line, f"--engine packed: .*{told[kind][0]}.*give --engine auto")
    argv = ["--adapter", "adapter", "--prompt", "a" * 30, "--engine", "packed"]
    line = refused(infer, argv, capsys, monkeypatch, tmp_path)
    assert_line(line, f"--engine packed: .*{told[kind][1]}.*give --engine auto")


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def in_fp8(folder, config, scales):
    """Save a base whose linear layers are stored in FP8, with a scale for those of the names that `scales` accepts."""
    base = small_base("llama")
    base.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "_proj." in name]:
        scale = tensors[name].abs().max() / 448
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        if scales(name):
            tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    configure(folder, quantization_config=config)
    return base


@pytest.mark.parametrize("missing", ["", "layers.1.mlp.up_proj"])
def test_codes_without_scales_are_not_taken_for_weights(missing, tmp_path):
    in_fp8(tmp_path, FP8, lambda name: missing and missing not in name)
    with pytest.raises(ModelError, match=rf"quantized weight .*{missing}.*weight \(F8_E4M3\) without its scales"):
        read_base(str(tmp_path))


def test_codes_with_scales_need_the_configuration(tmp_path):
    base = in_fp8(tmp_path, FP8, lambda name: True)
    weight, loaded = (each.model.layers[0].mlp.up_proj.weight for each in (base, read_base(str(tmp_path))))
    assert (loaded - weight).norm() < 0.05 * weight.norm()
    configure(tmp_path, quantization_config=None)
    with pytest.raises(ModelError, match=r"weight_scale_inv.*no quantization_config that uses it"):
        read_base(str(tmp_path))


@pytest.mark.parametrize("kind", ["llama", "bloom", "gpt2"])
def test_a_base_whose_files_lack_a_tensor_is_refused(kind, tmp_path):
    """transformers would draw it at random, anew at each load."""
    (make_bloom() if kind == "bloom" else small_base(kind)).save_pretrained(tmp_path)
    assert read_base(str(tmp_path)) is not None
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = sorted(name for name in tensors if "mlp" in name)[0]
    save_file({n: t for n, t in tensors.items() if n != name}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=rf"lack .*{re.escape(name.split('.', 1)[1])}"):
        read_base(str(tmp_path))


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_a_tensor_of_another_shape_is_named_with_its_file(kind, tmp_path):
    (make_bloom() if kind == "bloom" else small_base(kind)).save_pretrained(tmp_path, max_shard_size="30KB")
    file, tensors = next((p, t) for p in sorted(tmp_path.glob("*.safetensors")) if (t := matrices(load_file(p))))
    name, weight = next(iter(tensors.items()))
    save_file({**load_file(file), name: torch.zeros(weight.shape[0] + 1, weight.shape[1])}, file, {"format": "pt"})
    sizes = [str([weight.shape[0] + more, weight.shape[1]]) for more in (1, 0)]
    told = ".*".join(map(re.escape, [file.name, name.split(".", 1)[1], *sizes]))
    with pytest.raises(ModelError, match=told):
        read_base(str(tmp_path))


def matrices(tensors):
    return {name: tensor for name, tensor in tensors.items() if tensor.dim() == 2 and "mlp" in name}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["llama", "bloom", "gpt2"])
def test_a_weight_that_is_not_finite_is_named_with_its_file(kind, value, tmp_path):
    base = make_bloom() if kind == "bloom" else small_base(kind)
    name = sorted(name for name, weight in base.named_parameters() if weight.dim() == 1)[-1]
    with torch.no_grad():
        base.get_parameter(name)[-1] = value
    base.save_pretrained(tmp_path)
    told = rf"model\.safetensors: tensor {re.escape(name)} .*NaN or infinite"
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ModelError, match=told):
            load_base(str(tmp_path), torch.device("cpu"), dtype)


def test_a_weight_beyond_the_range_of_fp16_is_named(tmp_path):
    base = small_base("llama")
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight[0, 0] = 1e5
    base.save_pretrained(tmp_path)
    load_base(str(tmp_path), torch.device("cpu"), torch.float32)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight .*float16"):
        load_base(str(tmp_path), torch.device("cpu"), torch.float16)


NO_METHOD = ["gptq", ["gptq"], [{"quant_method": "gptq"}], 4, True, {}, {"bits": 4}, {"quant_method": ["gptq"]}]


@pytest.mark.parametrize("value", [*NO_METHOD, {"quant_method": "bitsandbytes"}], ids=str)
def test_a_quantization_config_without_a_method_is_named(value, tiny_base, tmp_path):
    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    configure(folder, quantization_config=value)
    with pytest.raises(ModelError, match=r"base.*quantization_config .* expected an object") as error:
        read_base(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["x", [1], 5, {"quant_method": "compressed-tensors"}], ids=str)
def test_a_former_name_of_quantization_config_is_refused(value, tiny_base, tmp_path):
    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    configure(folder, compression_config=value)
    with pytest.raises(ModelError, match=r"base.*compression_config.*rename it quantization_config"):
        read_base(str(folder))


def test_scales_without_a_quantization_config_are_refused(tmp_path):
    small_base("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    more = {"model.layers.0.mlp.up_proj.SCB": torch.ones(64)}
    save_file({**load_file(file), **more}, file, {"format": "pt"})
    with pytest.raises(ModelError, match="quantization_config"):
        read_base(str(tmp_path))
