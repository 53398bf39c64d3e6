"""Checkpoints that are stored quantized: loaded as they are and trained where transformers computes a gradient with
them, refused in one line elsewhere. (`test_unfit_bases` has those whose libraries are missing.)"""

import shutil

import pytest
import torch
from helpers.peers import naive_loss, random_examples
from helpers.programs import assert_line, jsonl, refused, run_infer, run_program
from helpers.quantized import CPU, FP32, assert_trains_as, base_to_quantize, configure, rounded_by_hand, saved
from safetensors.torch import load_file, save_file

import infer
import train
from softprompt.models.bitsandbytes_linear import dequantize, has_bitsandbytes_weight
from softprompt.models.loading import freeze, load_base, read_base
from softprompt.models.quantization import check_gradient, is_quantized
from softprompt.utils.errors import ModelError

pytest.importorskip("bitsandbytes", reason="needs pip install bitsandbytes")
pytest.importorskip("accelerate", reason="needs pip install accelerate")

EACH_BITS = pytest.mark.parametrize("bits", [8, 4])
FLAGS = ["--model_name_or_path", "stored", "--dataset", "rows.jsonl", "--output_dir", "run"]


@pytest.fixture
def base(request, tmp_path, tokenizer, monkeypatch):
    """A base, saved in `base`; the current folder has that and rows."""
    base = base_to_quantize(getattr(request, "param", "llama"))
    saved(base, tmp_path / "base", tokenizer)
    (tmp_path / "rows.jsonl").write_bytes(jsonl(*[{"instruction": str(n), "output": "ok"} for n in range(9)]))
    monkeypatch.chdir(tmp_path)
    return base


def store(bits, tokenizer):
    """Save `base` with bitsandbytes' weights in `stored`, as transformers does; return the quantized base."""
    quantized = read_base("base", bits=bits)
    saved(quantized, "stored", tokenizer)
    return quantized


@pytest.mark.parametrize("P", [1, 10])
@EACH_BITS
@pytest.mark.parametrize("base", ["bloom", "llama"], indirect=True)
def test_loss_and_gradient_are_those_of_the_stored_weights(base, bits, P, tokenizer):
    reference = freeze(rounded_by_hand(base, bits, store(bits, tokenizer)), FP32)
    stored = load_base("stored", CPU, FP32)
    assert any(map(has_bitsandbytes_weight, stored.modules()))
    assert_trains_as(stored, reference, tokenizer, P, 1e-5, 1e-5)


@EACH_BITS
def test_no_quantized_tensor_is_cast(base, bits, tokenizer):
    store(bits, tokenizer)
    in_files, loaded = load_file("stored/model.safetensors"), load_base("stored", CPU, torch.bfloat16).state_dict()
    quantized = {name for name, tensor in in_files.items() if not tensor.is_floating_point()}
    assert quantized and all(torch.equal(loaded[name], in_files[name]) for name in quantized)
    for name, module in load_base("stored", CPU, torch.bfloat16).named_modules():
        if has_bitsandbytes_weight(module) and bits == 8:
            assert torch.equal(module.weight.SCB, in_files[f"{name}.SCB"])


@EACH_BITS
def test_training_resuming_and_asking_on_the_command_line(base, bits, tokenizer, capsys, monkeypatch):
    store(bits, tokenizer)
    out, _ = run_program(train, [*FLAGS, "--max_steps", "2", "--eval_rows", "2"], capsys, monkeypatch)
    assert "Base stored, stored quantized (bitsandbytes), on cpu, float32" in out and "--load_in" not in out
    more = ["--output_dir", "run", "--resume_from_checkpoint", "run", "--max_steps", "3"]
    out, _ = run_program(train, more, capsys, monkeypatch)
    assert "resuming after step 2 of 3" in out
    run_infer(["--adapter", "run", "--prompt", "1", "--max_new_tokens", "4"], capsys, monkeypatch)
    run_infer(["--adapter", "run", "--prompt", "1", "--choices", "ok,no"], capsys, monkeypatch)


@pytest.mark.parametrize("flag", ["--load_in_4bit", "--load_in_8bit", "--stream_base", "--shard_base"])
@EACH_BITS
def test_flags_that_need_other_weights_are_refused(base, bits, flag, tokenizer, tmp_path, capsys, monkeypatch):
    store(bits, tokenizer)
    line = refused(train, [*FLAGS[:2], "--dataset", "none.jsonl", flag], capsys, monkeypatch, tmp_path)
    pattern = r"stored quantized \(bitsandbytes\), and {} needs weights that are not; leave it out, or give"
    if flag == "--shard_base":
        pattern = "{} shards a base among several processes"  # of one process alone, that is refused first
    assert_line(line, pattern.format(flag))
    if "load" in flag:
        with pytest.raises(ModelError, match=f"{flag} needs weights that are not"):
            load_base("stored", CPU, FP32, int(flag[-4]))


def test_a_configuration_that_promises_quantized_weights(base, tmp_path, tokenizer, capsys, monkeypatch):
    store(4, tokenizer)
    shutil.copy("base/model.safetensors", "stored/model.safetensors")
    line = refused(train, FLAGS, capsys, monkeypatch, tmp_path)
    assert_line(line, r"its weights are stored quantized \(bitsandbytes\), and none of them is; remove")


@pytest.mark.parametrize("where", ["self_attn.q_proj", "mlp.down_proj"])
def test_a_module_that_loses_the_gradient_is_found(base, where, tokenizer, monkeypatch):
    store(4, tokenizer)
    stored = load_base("stored", CPU, FP32)
    module = stored.model.layers[1].get_submodule(where)
    module.forward = lambda x: x.detach() @ dequantize(module, FP32).T
    with pytest.raises(ModelError, match=f"none passes through model.layers.1.{where}"):
        check_gradient(stored, FP32)


def test_a_gradient_that_is_not_finite_is_refused(base, tokenizer):
    store(8, tokenizer)
    tensors = load_file("stored/model.safetensors")
    tensors["model.layers.0.mlp.up_proj.SCB"][3] = torch.nan
    save_file(tensors, "stored/model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="no gradient with them here: it is not finite"):
        load_base("stored", CPU, FP32)


def test_fp8_is_dequantized_by_transformers_without_a_gpu(base, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("with a GPU, transformers computes in FP8")
    tensors = load_file("base/model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        scale = tensors[name].abs().max() / 448
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale.expand(1, 1).clone()  # one block of at most 128 × 128 values
    save_file(tensors, "base/model.safetensors", {"format": "pt"})
    configure(tmp_path / "base", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    loaded = load_base("base", CPU, FP32)
    assert not is_quantized(loaded)
    for name, module in loaded.named_modules():
        if name.endswith("proj"):
            expected = tensors[f"{name}.weight"].float() * tensors[f"{name}.weight_scale_inv"]
            assert torch.allclose(module.weight, expected, rtol=2**-8)  # transformers rounds to bf16
    rows, leaf = random_examples(3, 9), torch.randn(2, 64, requires_grad=True)
    naive_loss(loaded, leaf, rows).backward()
    assert leaf.grad.norm() > 0


def test_a_folder_of_4_bit_tensors_that_no_configuration_mentions(base, tmp_path, tokenizer):
    store(4, tokenizer)
    configure(tmp_path / "stored", quantization_config=None)
    with pytest.raises(ModelError, match="quantization_config"):
        load_base("stored", CPU, FP32)


def test_infer_refuses_to_quantize_again(base, tmp_path, tokenizer, capsys, monkeypatch):
    store(8, tokenizer)
    run_program(train, [*FLAGS, "--max_steps", "1"], capsys, monkeypatch)
    argv = ["--adapter", "run", "--prompt", "1", "--load_in_4bit"]
    line = refused(infer, argv, capsys, monkeypatch, tmp_path)
    assert_line(line, "--load_in_4bit needs weights that are not")
