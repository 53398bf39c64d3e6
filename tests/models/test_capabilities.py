"""What a base says of itself is looked at before the first step: sizes, positions, words, per-layer inputs, and whether
it can answer at all. Every base here is a tiny random one."""

import json
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from helpers.adapters import write_adapter
from helpers.bases import make_bloom, make_tokenizer
from helpers.peers import answers_of
from helpers.programs import assert_line, refused
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

import infer
import softprompt
import train
from softprompt.cli import run_command
from softprompt.data.collate import Batch
from softprompt.engines.factory import padded_engine
from softprompt.engines.padded import padded_forward
from softprompt.export.plain_model import export
from softprompt.generation.model import SoftPromptModel
from softprompt.generation.requests import GenerationSettings
from softprompt.models.capabilities import build_on_meta_device, max_positions, why_not_generate
from softprompt.models.loading import freeze, load_base, word_embeddings
from softprompt.study.grid import read_study
from softprompt.study.plan import plan_study
from softprompt.study.study import run_study
from softprompt.utils.errors import ConfigError, ModelError, SoftpromptError
from softprompt.utils.model_config import layers_and_heads

CPU, FP32 = torch.device("cpu"), torch.float32
V, POSITIONS, P = 300, 64, 4
TEXT = {
    **{"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3},
}
VISION = {
    **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 28, "patch_size": 14},
}
GPT = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
SHORT = GPT | {"n_positions": POSITIONS}
LAYERS = {**TEXT, "vocab_size_per_layer_input": V, "hidden_size_per_layer_input": 16, "sliding_window": 8}

# By transformers' class of the configuration: arguments, and what is expected where positions are limited.
WITH_TABLE = {
    "GPT2Config": SHORT,
    "GPTBigCodeConfig": SHORT,
    "GPTJConfig": SHORT | {"rotary_dim": 4},
    "CodeGenConfig": SHORT | {"rotary_dim": 4},
    "OpenAIGPTConfig": SHORT,
    "CTRLConfig": SHORT | {"dff": 48},
    "GPTNeoConfig": {
        **{"vocab_size": V, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]},
        **{"max_position_embeddings": POSITIONS, "bos_token_id": 1, "eos_token_id": 2},
    },
    "OPTConfig": {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": POSITIONS},
    "BioGptConfig": {**TEXT, "max_position_embeddings": POSITIONS},
    "MptConfig": {"vocab_size": V, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": POSITIONS},
    "BartConfig": {
        **{"vocab_size": V, "d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 48, "decoder_attention_heads": 4},
        **{"max_position_embeddings": POSITIONS, "is_decoder": True, "is_encoder_decoder": False},
    },
}
WITHOUT_TABLE = {
    "LlamaConfig": TEXT | {"max_position_embeddings": POSITIONS},
    "GPTNeoXConfig": TEXT | {"max_position_embeddings": POSITIONS},
    "FalconConfig": {
        **{"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"alibi": True, "new_decoder_architecture": False, "max_position_embeddings": POSITIONS},
    },
    "XGLMConfig": {
        **{"vocab_size": V, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
        **{"max_position_embeddings": POSITIONS},
    },
    "MambaConfig": {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "RwkvConfig": {"vocab_size": V, "hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2},
    "Gemma3Config": {
        **{"text_config": TEXT | {"max_position_embeddings": POSITIONS}, "vision_config": VISION},
        **{"mm_tokens_per_image": 4, "image_token_index": V - 1, "boi_token_index": V - 2, "eoi_token_index": V - 3},
    },
}
ROWS = [{"instruction": f"hello {i}", "input": "", "output": "ok"} for i in range(8)]
ONE = ["--max_steps", "1", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"]


def configured(name: str):
    """A configuration; skipped where this transformers has no such class."""
    made = getattr(transformers, name, None)
    return made(**{**WITH_TABLE, **WITHOUT_TABLE}[name]) if made else pytest.skip(f"transformers has no {name}")


def make(config):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return base


def saved(base, folder: Path) -> Path:
    base.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def rows_file(folder: Path, rows=ROWS) -> Path:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder / "rows.jsonl"


def called(program, argv, capsys, monkeypatch) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a program, run in this process."""
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, argv)])
    with pytest.raises(SystemExit) as ended:
        run_command(program.main)
    return ended.value.code, *capsys.readouterr()


def training(base: Path, out: Path, *more, rows=ROWS) -> list:
    given = ["--model_name_or_path", base, "--dataset", rows_file(base.parent, rows), "--output_dir", out]
    return [*given, "--num_virtual_tokens", P, *ONE, *more]


@pytest.mark.parametrize("name", WITH_TABLE)
@torch.no_grad()
def test_positions_of_a_table_are_counted(name):
    """As many as a forward takes, and one more is too many; the same is found without the values."""
    base = make(configured(name))
    assert max_positions(base) == max_positions(build_on_meta_device(base.config, name)) == POSITIONS
    base(inputs_embeds=torch.randn(1, POSITIONS, 32))
    with pytest.raises((IndexError, RuntimeError)):
        base(inputs_embeds=torch.randn(1, POSITIONS + 1, 32))
    engine = padded_engine(freeze(base, FP32), make_tokenizer(), FP32, 128)
    fits = softprompt.data.tokenization.Example([5] * (POSITIONS - P), [-100] + [5] * (POSITIONS - P - 1))
    assert len(engine.row_losses(torch.randn(P, 32), [fits])) == 1
    with pytest.raises(ConfigError, match=f"--max_length {POSITIONS - P} "):
        engine.row_losses(
            torch.randn(P, 32), [softprompt.data.tokenization.Example([5, *fits.input_ids], [-100, *fits.labels])]
        )


@pytest.mark.parametrize("name", WITHOUT_TABLE)
@torch.no_grad()
def test_other_bases_have_no_last_position(name):
    base = make(configured(name))
    assert max_positions(base) is None
    base(inputs_embeds=torch.randn(1, POSITIONS + 20, 32))


@pytest.mark.parametrize("name", ["GPT2Config", "OPTConfig", "MptConfig"])
def test_answers_end_where_the_positions_do(name):
    """In a batch of short and long texts, too, where the others go on behind the longest's end."""
    base, prompt = freeze(make(configured(name)), FP32), torch.randn(P, 32)
    never = GenerationSettings(max_length=1000, do_sample=False, eos_token_id=(299,), suppress_tokens=(299,))
    texts = [[5] * 3, [6] * (POSITIONS - P - 2), [7] * 30]
    asked = [(ids, prompt) for ids in texts]
    together = answers_of("padded", base, make_tokenizer(), asked, never)
    assert [len(answer) for answer in together] == [POSITIONS - P - len(ids) for ids in texts]
    assert together == [answers_of("padded", base, make_tokenizer(), [one], never)[0] for one in asked]
    with pytest.raises(ConfigError, match=f"{POSITIONS} positions"):
        answers_of("padded", base, make_tokenizer(), [([5] * (POSITIONS - P), prompt)], never)


def test_a_run_beyond_the_positions_is_refused_and_one_within_answers(tmp_path, capsys, monkeypatch):
    base = saved(make(configured("GPT2Config")), tmp_path / "gpt2")
    long = [*ROWS, {"instruction": "hello" * 60, "input": "", "output": "ok"}]
    for more, rows in ((["--max_length", 61], ROWS), ([], long)):
        argv = training(base, tmp_path / "r", *more, rows=rows)
        assert_line(refused(train, argv, capsys, monkeypatch, tmp_path), "--max_length 60")
    code, _, err = called(train, training(base, tmp_path / "r", "--eval_rows", 2), capsys, monkeypatch)
    assert code == 0, err
    code, _, err = called(infer, ["--adapter", tmp_path / "r", "--prompt", "hello"], capsys, monkeypatch)
    assert code == 0, err
    for more in ([], ["--choices", "ok,no"]):
        asked = ["--adapter", tmp_path / "r", "--prompt", "hello" * 60, *more]
        assert_line(refused(infer, asked, capsys, monkeypatch, tmp_path), f"{POSITIONS} positions")
    given = ["--adapter", tmp_path / "r", "--eval_dataset", rows_file(tmp_path, long)]
    assert_line(refused(infer, given, capsys, monkeypatch, tmp_path), "--max_length 60")
    model = SoftPromptModel.from_pretrained(adapter=tmp_path / "r")
    with pytest.raises(ConfigError, match="question 2"):
        model.generate(["hello", "hello" * 60], max_new_tokens=2)


def test_a_study_looks_at_positions_and_words_before_its_first_cell(tmp_path):
    saved(make(configured("GPT2Config")), tmp_path / "gpt2")
    saved(make_bloom(vocab_size=200), tmp_path / "few")
    rows_file(tmp_path)

    def study(base: str, settings: str = "") -> list:
        lines = ["seeds = [1]", "[settings]", f"model_name_or_path = '{tmp_path / base}'", settings]
        lines += [f"dataset = '{tmp_path / 'rows.jsonl'}'", "eval_rows = 2", "[[grid]]", "num_virtual_tokens = [2, 10]"]
        (tmp_path / "s.toml").write_text("\n".join(lines), encoding="utf-8")
        return plan_study(read_study(tmp_path / "s.toml"))

    assert len(study("gpt2")) == 2
    with pytest.raises(ConfigError, match="--max_length 54"):
        study("gpt2", "max_length = 60")
    with pytest.raises(ModelError, match=r"300 words.*200 rows"):
        study("few")


@pytest.mark.parametrize("name", ["MambaConfig", "RwkvConfig", "Gemma3Config"])
def test_a_base_without_heads_of_its_own_is_trained_and_saved_as_peft_reads_it(name, tmp_path, capsys, monkeypatch):
    base = saved(make(configured(name)), tmp_path / "base")
    config = AutoConfig.from_pretrained(base)
    code, out, err = called(train, training(base, tmp_path / "r", "--eval_rows", 2), capsys, monkeypatch)
    assert code == 0, err
    written = json.loads((tmp_path / "r" / "adapter_config.json").read_text(encoding="utf-8"))
    heads = 4 if name == "Gemma3Config" else 1
    assert (written["num_layers"], written["num_attention_heads"]) == layers_and_heads(config) == (2, heads)
    values = load_file(tmp_path / "r" / "adapter_model.safetensors")["prompt_embeddings"]
    assert values.shape == (P, 32)
    if name == "MambaConfig":
        loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "r")
        assert torch.equal(loaded.prompt_encoder["default"].embedding.weight, values)
    code, out, err = called(train, training(base, tmp_path / "d", "--dry_run"), capsys, monkeypatch)
    assert code == 0 and "memory" in out, err


def test_a_base_whose_generate_takes_no_embeddings_answers_in_continuous_batches(tmp_path, capsys, monkeypatch):
    base = make(configured("Gemma3Config"))
    saved(base, tmp_path / "base")
    more = ["--eval_rows", 2, "--engine", "packed"]
    code, out, err = called(train, training(tmp_path / "base", tmp_path / "r", *more), capsys, monkeypatch)
    assert code == 0 and "Try:" in out, err
    assert "eval_loss" in json.loads((tmp_path / "r" / "all_results.json").read_text(encoding="utf-8"))
    code, out, err = called(infer, ["--adapter", tmp_path / "r", "--prompt", "hello"], capsys, monkeypatch)
    assert code == 0, err


@pytest.mark.parametrize("name", ["OpenAIGPTConfig", "CTRLConfig"])
def test_a_base_that_cannot_answer_is_trained_for_its_loss(name, tmp_path, capsys, monkeypatch):
    base = make(configured(name))
    if why_not_generate(base) is None:
        pytest.skip("this transformers lets it answer")
    saved(base, tmp_path / "base")
    code, out, err = called(train, training(tmp_path / "base", tmp_path / "r", "--eval_rows", 2), capsys, monkeypatch)
    assert code == 0 and type(base).__name__ in out and "Try:" not in out, err
    found = json.loads((tmp_path / "r" / "all_results.json").read_text(encoding="utf-8"))
    assert {"eval_loss", "eval_perplexity"} <= found.keys() and "eval_exact_match" not in found
    best = ["--eval_rows", 2, "--load_best_model_at_end", "--metric_for_best_model", "exact_match"]
    best += ["--eval_strategy", "steps", "--eval_steps", 1, "--save_steps", 1]
    argv = training(tmp_path / "base", tmp_path / "b", *best)
    assert_line(refused(train, argv, capsys, monkeypatch, tmp_path), "--metric_for_best_model")
    argv = ["--adapter", tmp_path / "r", "--prompt", "hello"]
    assert_line(refused(infer, argv, capsys, monkeypatch, tmp_path), type(base).__name__)
    asked = ["--adapter", tmp_path / "r", "--prompt", "hello", "--choices", "ok,no"]
    assert called(infer, asked, capsys, monkeypatch)[0] == 0


def per_layer(name: str, text: str):
    made = getattr(transformers, text, None) or pytest.skip(f"transformers has no {text}")
    more = {"num_kv_shared_layers": 0}
    if text == "Gemma3nTextConfig":
        more |= {"layer_types": ["sliding_attention", "full_attention"], "laurel_rank": 8, "altup_num_inputs": 2}
        more |= {"activation_sparsity_pattern": [0.0] * 2}
    return make_per_layer(getattr(transformers, name)(made(**LAYERS, **more)).eval())


@torch.no_grad()
def make_per_layer(base):
    torch.manual_seed(0)
    for parameter in base.parameters():
        parameter.copy_(0.2 * torch.randn_like(parameter) + (parameter.dim() == 1))
    return base


@pytest.mark.parametrize(
    "name, text", [("Gemma3nForCausalLM", "Gemma3nTextConfig"), ("Gemma4ForCausalLM", "Gemma4TextConfig")]
)
def test_a_base_that_looks_words_up_again_is_refused(name, text, tmp_path, capsys, monkeypatch):
    base = saved(per_layer(name, text), tmp_path / "base")
    line = refused(train, training(base, tmp_path / "r"), capsys, monkeypatch, tmp_path)
    assert_line(line, f"{name} .*hidden_size_per_layer_input.*take a base without")
    with pytest.raises(ModelError):
        load_base(str(base), CPU, FP32)


@pytest.mark.parametrize("name", [*WITH_TABLE, *WITHOUT_TABLE])
@torch.no_grad()
def test_a_base_that_passes_gives_its_own_logits_without_a_prompt(name):
    base = freeze(make(configured(name)), FP32)
    ids = torch.tensor([[1, 50, 60, 70, 80]])
    padded_engine(base, make_tokenizer(), FP32, 128)
    ours, _ = padded_forward(
        base, word_embeddings(base).weight[:0], Batch(ids, torch.ones_like(ids), torch.full_like(ids, -100))
    )
    assert torch.allclose(ours, base(input_ids=ids).logits, atol=1e-5)


def scaled(base):
    """Scales its words itself, outside its embedding."""
    forward = base.forward

    def other(input_ids=None, inputs_embeds=None, **more):
        if inputs_embeds is None:
            inputs_embeds = 3 * base.get_input_embeddings()(input_ids)
        return forward(inputs_embeds=inputs_embeds, **more)

    base.forward = other
    return base


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16])
def test_the_kind_is_caught_and_not_the_name(dtype):
    """Embeddings that are changed outside the embedding module, positions that do not begin at 0, attention to later
    tokens: the forward itself is compared, so a model class that is not known by name is refused as well."""
    tokenizer = make_tokenizer()
    bert = {**TEXT, "max_position_embeddings": POSITIONS, "type_vocab_size": 1}
    bases = [
        scaled(make(configured("LlamaConfig"))),
        make(transformers.RobertaConfig(**bert, is_decoder=True)),
        make(transformers.BertConfig(**bert)),
    ]
    for base in bases:
        with pytest.raises(ModelError, match="logits"):
            padded_engine(freeze(base, dtype), tokenizer, dtype, 128)
        with pytest.raises(ModelError, match="logits"):
            SoftPromptModel(base, tokenizer, None, compute_dtype=dtype)
    padded_engine(freeze(make(configured("LlamaConfig")), dtype), tokenizer, dtype, 128)
    padded_engine(freeze(make(transformers.BertConfig(**bert, is_decoder=True)), dtype), tokenizer, dtype, 128)


def test_every_entrance_refuses_a_base_whose_forward_differs(tmp_path):
    """Training, inference, a study and an export each check the forward of the base that they compute with."""
    config = transformers.RobertaConfig(**TEXT, max_position_embeddings=POSITIONS, type_vocab_size=1, is_decoder=True)
    base, adapter = str(saved(make(config), tmp_path / "base")), tmp_path / "adapter"
    write_adapter(adapter, Path(base), P)
    settings = {"model_name_or_path": base, "dataset": str(rows_file(tmp_path)), "num_virtual_tokens": P}
    cell = "".join(f"{name} = {value!r}\n" for name, value in {**settings, "eval_rows": 2}.items())
    (tmp_path / "study.toml").write_text(f"output_dir = {str(tmp_path / 's')!r}\n[settings]\n{cell}", encoding="utf-8")
    entrances = {
        "train": lambda: softprompt.train(**settings, output_dir=str(tmp_path / "r"), max_steps=1),
        "infer": lambda: SoftPromptModel.from_pretrained(base, adapter),
        "study": lambda: run_study(read_study(tmp_path / "study.toml")),
        "export": lambda: export(adapter, tmp_path / "plain", model_name_or_path=base),
    }
    for name, call in entrances.items():
        with pytest.raises(SoftpromptError, match="RobertaForCausalLM gives other logits"):
            call()
            pytest.fail(f"{name} took the base")


def test_a_tokenizer_with_more_words_than_the_base_is_refused(tmp_path, capsys, monkeypatch):
    for base in (make_bloom(vocab_size=250), make(transformers.LlamaConfig(**{**TEXT, "vocab_size": 250}))):
        folder = saved(base, tmp_path / type(base).__name__)
        line = refused(train, training(folder, tmp_path / "r"), capsys, monkeypatch, tmp_path)
        assert_line(line, f"{folder}: .*300 words.*250 rows.*take the tokenizer")
        with pytest.raises(ModelError, match=r"300 words.*250 rows"):
            SoftPromptModel(base, make_tokenizer(), None)


@pytest.mark.parametrize("engine", ["packed", "padded"])
def test_a_special_token_beyond_the_base_is_refused_where_a_text_has_it(engine, tmp_path, capsys, monkeypatch):
    base = make_bloom()
    base.save_pretrained(tmp_path / "base")
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(tmp_path / "base")
    given = ["--engine", engine]
    strange = [*ROWS, {"instruction": "<image>", "input": "", "output": "ok"}]
    argv = training(tmp_path / "base", tmp_path / "r", *given, rows=strange)
    assert_line(refused(train, argv, capsys, monkeypatch, tmp_path), "a row of the dataset: token id 300")
    start = ["--prompt_tuning_init", "TEXT", "--prompt_tuning_init_text", "a <image>"]
    argv = training(tmp_path / "base", tmp_path / "r", *given, *start)
    assert_line(refused(train, argv, capsys, monkeypatch, tmp_path), "--prompt_tuning_init_text: token id 300")
    code, _, err = called(train, training(tmp_path / "base", tmp_path / "r", *given), capsys, monkeypatch)
    assert code == 0, err
    asked = ["--adapter", tmp_path / "r", *given, "--max_new_tokens", "2", "--prompt"]
    assert called(infer, [*asked, "hello"], capsys, monkeypatch)[0] == 0
    assert_line(refused(infer, [*asked, "<image>"], capsys, monkeypatch, tmp_path), "token id 300")


def test_a_pad_token_that_the_base_does_not_have_changes_nothing():
    base, expected = freeze(make(configured("LlamaConfig")), FP32), None
    for other in (False, True):
        tokenizer = make_tokenizer()
        if other:
            tokenizer.add_special_tokens({"pad_token": "<another>"})
            assert tokenizer.pad_token_id == V
        model = SoftPromptModel(base, tokenizer, torch.ones(3, 32), engine="padded")
        answers = model.generate(["a", "a longer one"], do_sample=False, max_new_tokens=6)
        found = answers, [one.probabilities for one in model.classify(["a", "b"], ["x", "a longer one"])]
        expected = expected or found
        assert found == expected


ODD = {
    "pad": {"pad_token_id": 99_999},
    "eos": {"eos_token_id": [5, 6, 99_999]},
    "forced": {"forced_bos_token_id": 50, "forced_eos_token_id": 51},
    "suppressed": {"suppress_tokens": list(range(4, 250)), "begin_suppress_tokens": list(range(200, 300))},
    "words": {"bad_words_ids": [[i] for i in range(4, 200)], "sequence_bias": [[[7], 100.0]]},
    "lengths": {"max_length": 2, "min_length": 50, "max_time": 1e-6},
    "beams": {"num_beams": 3, "num_return_sequences": 3},
    "penalties": {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "guidance_scale": 2.0},
    "sampling": {"do_sample": False, "temperature": 0.1, "top_p": 0.1, "typical_p": 0.1},
    "search": {"penalty_alpha": 0.6, "top_k": 4, "use_cache": False, "stop_strings": ["a"]},
    "output": {"return_dict_in_generate": True, "output_scores": True, "cache_implementation": "static"},
}


@pytest.mark.parametrize("engine", ["packed", "padded"])
def test_a_generation_config_of_the_base_has_no_effect(engine):
    base, tokenizer, prompt = make_bloom(seed=2), make_tokenizer(), torch.ones(3, 32)
    model = SoftPromptModel(freeze(base, FP32), tokenizer, prompt, engine=engine)

    def answers() -> list:
        ways = [{"do_sample": False}, {"seed": 3}, {"do_sample": False, "num_beams": 2}]
        return [model.generate(["a", "b"], max_new_tokens=8, **way) for way in ways]

    base.generation_config = GenerationConfig()
    expected = answers()
    for name, odd in ODD.items():
        base.generation_config = of_base = GenerationConfig(**odd)
        assert answers() == expected, name
        assert base.generation_config is of_base
