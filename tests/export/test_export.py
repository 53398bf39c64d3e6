"""Exported models: read by transformers alone, they answer like base and prompt and never generate a new token."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.adapters import write_adapter_for
from helpers.bases import make_bloom, make_tokenizer
from helpers.peers import peft_model
from helpers.programs import refused
from helpers.small_bases import small_base
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from softprompt import SoftPromptModel, cli
from softprompt.export import plain_model
from softprompt.export.bake_prompt import NEVER_LOGIT, constant_logit_row
from softprompt.export.chat_template import new_token_names
from softprompt.export.plain_model import export, generation_config
from softprompt.generation.requests import GenerationSettings
from softprompt.models.loading import base_path
from softprompt.prompt.file_names import CONFIG_FILE, SETTINGS_FILE
from softprompt.utils.errors import AdapterError, ModelError, SoftpromptError

QUESTIONS = ["我爱这部电影", "这家酒店太差了！ 1 < 2", "hello\n  world {x} {{ y }}"]


NEW_TOKENS = 9


EXPORT = SimpleNamespace(main=cli.export, __name__="export")


def write_base(folder: Path, base: Any, tokenizer: Any = None) -> Path:
    base.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return folder


@dataclass
class Case:
    """A base, an adapter for it, the exported folder, and the output of transformers for that folder."""

    base: str
    adapter: Path
    folder: Path
    read: dict[str, Any]

    def ours(self) -> SoftPromptModel:
        return SoftPromptModel.from_pretrained(self.base, self.adapter, device="cpu")

    @property
    def P(self) -> int:
        return int(json.loads((self.adapter / CONFIG_FILE).read_text())["num_virtual_tokens"])


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes, tie_word_embeddings=True, initializer_range=0.3))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, **sizes, initializer_range=0.3, bos_token_id=1, eos_token_id=2))
    model.transformer.ln_f.bias.data += 0.2 * torch.randn(32)
    return model


def bloom_46k(shared: Path) -> BloomForCausalLM:
    return make_bloom(hidden_size=64, vocab_size=len(AutoTokenizer.from_pretrained(shared / "tokenizer-46k")))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Adapters for every kind of base, exported here and read by transformers in another process."""
    root = tmp_path_factory.mktemp("export")
    bases = {"mini": "mini"}
    models = {"tiny": make_bloom(), "flat": make_bloom(seed=3), "llama": llama(), "gpt2": gpt2()}
    models["gemma"] = small_base("gemma3_text")  # scales its words' embeddings, but not those it is given
    models["flat"].transformer.ln_f.bias.data.zero_()  # no constant logit to be had
    models["spare"] = make_bloom(vocab_size=317)  # more rows than the tokenizer has words
    models["long"] = make_bloom()  # fewer
    tokenizers = {"long": make_tokenizer()}
    tokenizers["long"].add_tokens(["<|unused|>", "<|unused too|>"])
    if "SOFTPROMPT_SHARED" in os.environ:
        shared = Path(os.environ["SOFTPROMPT_SHARED"])
        models["46k"], tokenizers["46k"] = bloom_46k(shared), AutoTokenizer.from_pretrained(shared / "tokenizer-46k")
    for name, model in models.items():
        bases[name] = str(write_base(root / "bases" / name, model, tokenizers.get(name)))
    models["mini"] = AutoModelForCausalLM.from_pretrained(base_path("mini"))
    made = []
    for number, (name, base) in enumerate(bases.items()):
        adapter = write_adapter_for(root / "adapters" / name, models[name], base, 5 + number, template="default")
        made.append((name, base, adapter, "float32"))
    made.append(("mini bfloat16", "mini", root / "adapters" / "mini", "bfloat16"))
    for name, _, adapter, dtype in made:
        export(adapter, root / name, dtype=dtype)
    jobs = [{"folder": str(root / m[0]), "questions": QUESTIONS, "new_tokens": NEW_TOKENS} for m in made]
    (root / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    command = [
        sys.executable,
        Path(__file__).parents[1] / "helpers" / "plain_reader.py",
        root / "jobs.json",
        root / "results.pt",
    ]
    subprocess.run(list(map(str, command)), check=True, cwd=root, stderr=subprocess.DEVNULL)
    read = torch.load(root / "results.pt")
    return {m[0]: Case(m[1], m[2], root / m[0], result) for m, result in zip(made, read, strict=True)}


EXACT = ["tiny", "mini", "46k", "flat", "spare", "long", "gpt2", "llama", "gemma"]


@pytest.fixture
def case(cases, request) -> Case:
    if request.param not in cases:
        pytest.skip("needs the folder of real data that SOFTPROMPT_SHARED names")
    return cases[request.param]


@pytest.mark.parametrize("case", EXACT, indirect=True)
def test_greedy_answers_equal_those_of_base_and_prompt(case):
    expected = case.ours().generate(QUESTIONS, do_sample=False, max_new_tokens=NEW_TOKENS)
    assert len(set(expected)) > 1
    for kind in ("answer", "unguarded", "pipeline_messages", "pipeline_string"):
        assert [row[kind].strip() for row in case.read["rows"]] == expected, kind
    assert [text.strip() for text in case.read["batch"]] == expected


@pytest.mark.parametrize("case", ["tiny", "mini", "46k", "flat", "spare"], indirect=True)
def test_logits_equal_those_of_peft(case):
    ours = case.ours()
    peer = peft_model(ours.base, ours.prompt)
    for question, row in zip(QUESTIONS, case.read["rows"], strict=True):
        ids = ours.tokenizer(ours.template.render({"instruction": question, "input": ""}, None))["input_ids"]
        with torch.no_grad():
            expected = peer(input_ids=torch.tensor([ids])).logits[0, case.P :]
        assert row["ids"][case.P :] == ids
        V = min(row["ids"][0], expected.shape[1])
        assert (row["logits"][case.P :, :V] - expected[:, :V]).abs().max() <= 1e-5 * max(1, expected.abs().max())


@pytest.mark.parametrize("case", [*EXACT, "mini bfloat16"], indirect=True)
def test_new_tokens_are_special_and_have_negligible_probability(case):
    tokenizer = AutoTokenizer.from_pretrained(case.folder)
    words = [f"<|softprompt_{i}|>" for i in range(case.P)]
    ids = tokenizer.convert_tokens_to_ids(words)
    assert ids == list(range(ids[0], ids[0] + case.P))
    assert [
        tokenizer(f"我{word}b", add_special_tokens=False)["input_ids"].count(i)
        for word, i in zip(words, ids, strict=True)
    ] == [1] * case.P
    for question, row in zip(QUESTIONS, case.read["rows"], strict=True):
        assert row["ids"][: case.P] == ids and row["string_ids"] == row["ids"]
        assert row["shown"] == f"Human: {question}\n\nAssistant: "
        probabilities = row["logits"].double().softmax(-1)[:, ids]
        if case.folder.name in ("flat", "llama", "gemma"):  # no constant to be had: the mean of all other logits
            assert probabilities.max() <= 1 / ids[0]
            assert (row["logits"].argmax(-1) < ids[0]).all()
        else:
            assert probabilities.max() == 0
            assert row["logits"][:, ids].sub(NEVER_LOGIT).abs().max() < 0.1 * -NEVER_LOGIT
    settings = GenerationConfig.from_pretrained(case.folder)
    assert settings.suppress_tokens == ids
    assert (settings.eos_token_id, settings.pad_token_id) == (2, 3)
    assert case.read["tied"] is False


def test_with_a_tied_head_a_new_token_would_be_the_most_likely(cases):
    """The reason why the head is untied, on the mini base with a random prompt."""
    ours = cases["mini"].ours()
    with torch.no_grad():
        h = ours.base.transformer(torch.tensor([ours.tokenizer("Human: 我爱这部电影\n\nAssistant: ")["input_ids"]]))[0]
    assert (h @ ours.prompt.T).max() > ours.base.lm_head(h).max()


def test_in_bf16_prompt_and_base_are_only_rounded(cases):
    case = cases["mini bfloat16"]
    assert case.read["dtype"] == "torch.bfloat16"
    model = AutoModelForCausalLM.from_pretrained(case.folder)
    ours = case.ours()
    rows = model.get_input_embeddings().weight
    assert torch.equal(rows[-case.P :], ours.prompt.bfloat16())
    assert torch.equal(rows[: -case.P], ours.base.get_input_embeddings().weight.bfloat16())
    assert torch.equal(model.lm_head.weight[: -case.P], rows[: -case.P])
    for row in case.read["rows"]:
        assert row["answer"] == row["unguarded"]


def test_base_weights_are_unchanged(cases):
    case = cases["tiny"]
    model = AutoModelForCausalLM.from_pretrained(case.folder)
    base = AutoModelForCausalLM.from_pretrained(case.base).state_dict()
    assert model.config.vocab_size == 300 + case.P == model.lm_head.weight.shape[0]
    assert torch.equal(model.get_input_embeddings().weight[300:], case.ours().prompt)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor[:300] if tensor.shape[0] == 300 + case.P else tensor, base[name]), name
    assert sorted(p.name for p in case.folder.iterdir()) == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert not [p.name for p in case.folder.parent.iterdir() if p.name.startswith(".")]


@given(
    H=st.integers(8, 300),
    seed=st.integers(0, 2**20),
    spread=st.sampled_from([1e-3, 0.1, 3.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@settings(max_examples=60, deadline=None)
def test_the_constant_logit_holds_for_any_layer_norm(H, seed, spread, dtype):
    draw = torch.Generator().manual_seed(seed)
    norm = torch.nn.LayerNorm(H).requires_grad_(False)
    norm.weight += 0.3 * torch.randn(H, generator=draw)
    norm.bias += spread * torch.randn(H, generator=draw)
    row = constant_logit_row(norm.weight, norm.bias, dtype)
    if row is None:  # refused: the sum is small beside what rounding alone makes of it
        total = (norm.bias.to(dtype).double() / norm.weight.to(dtype).double()).sum().abs()
        ratio = (norm.bias / norm.weight).norm()
        assert dtype != torch.float32 or total < 1e-3 * (H**0.5 + ratio)
        return
    h = norm.to(dtype)(20 * torch.randn(200, H, generator=draw).to(dtype))
    logits = torch.nn.functional.linear(h, row.to(dtype)[None]).float()
    assert torch.equal(row, row.to(dtype).float())
    assert logits.max() < NEVER_LOGIT / 2 and logits.isfinite().all()


def test_layer_norms_without_a_constant_logit():
    ones, zeros = torch.ones(32), torch.zeros(32)
    balanced = torch.cat([torch.ones(16), -torch.ones(16)])
    for weight, bias in ((ones, zeros), (ones, balanced), (torch.cat([zeros[:1], ones[1:]]), ones)):
        assert constant_logit_row(weight, bias, torch.float32) is None


def test_a_prompt_for_an_exported_model_gets_new_token_names(cases, tmp_path):
    first = cases["tiny"]
    model = AutoModelForCausalLM.from_pretrained(first.folder)
    adapter = write_adapter_for(tmp_path / "second", model, str(first.folder), 2)
    export(adapter, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert new_token_names(AutoTokenizer.from_pretrained(first.folder), 1) == ["<|softprompt2_0|>"]
    assert tokenizer("<|softprompt2_1|>")["input_ids"] == [300 + first.P + 1]
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    assert settings.suppress_tokens == list(range(300, 300 + first.P + 2))


def test_generation_settings_come_from_the_adapter(tmp_path, tiny_base, cases):
    defaults = GenerationConfig.from_pretrained(cases["tiny"].folder)
    assert (defaults.max_length, defaults.do_sample, defaults.top_k) == (256 + cases["tiny"].P, True, 50)
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    saved = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 17, "repetition_penalty": 1.2}
    export(write_adapter_for(tmp_path / "a", model, str(tiny_base), 2, generation=saved), tmp_path / "out")
    found = GenerationConfig.from_pretrained(tmp_path / "out")
    assert {name: getattr(found, name) for name in saved} == saved and found.max_length is None
    greedy = GenerationSettings(do_sample=False, max_length=20)
    made = generation_config(make_tokenizer(), greedy, [300, 301])
    assert (made.do_sample, made.max_length, made.suppress_tokens) == (False, 22, [300, 301])
    made.save_pretrained(tmp_path)  # transformers refuses a temperature beside greedy answers here


def test_an_adapter_of_peft_is_exported_with_the_default_template(tmp_path, cases):
    case = cases["tiny"]
    peft_model(AutoModelForCausalLM.from_pretrained(case.base), case.ours().prompt).save_pretrained(tmp_path / "peft")
    assert not (tmp_path / "peft" / SETTINGS_FILE).exists()
    line = export(tmp_path / "peft", tmp_path / "out", model_name_or_path=case.base)
    assert f"{case.P} new tokens" in line
    for name in ("model.safetensors", "chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (case.folder / name).read_bytes()


def test_the_model_card_and_its_snippet(cases, monkeypatch, capsys):
    card = (cases["mini"].folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "`<|softprompt_0|>`" in card and "suppress_tokens" in card and "float32" in card
    monkeypatch.chdir(cases["mini"].folder)
    exec(card.split("```python\n")[1].split("```")[0], {})
    assert capsys.readouterr().out.strip()
    (all_of,) = re.findall(r"`(''\.join.*)`\.", card)
    names = [f"<|softprompt_{n}|>" for n in range(cases["mini"].P)]
    assert eval(all_of) == "".join(names)


def test_the_example_for_prompt_embeddings_gives_the_same_answer(cases):
    case = cases["mini"]
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    for block in blocks:
        compile(block, "docs/export.md", "exec")
    (example,) = [block for block in blocks if "inputs_embeds" in block]
    found: dict[str, Any] = {}
    exec(example.replace("BASE", base_path("mini")).replace("ADAPTER", str(case.adapter)), found)
    assert found["answer"].strip() == case.ours().generate("我爱这部电影", do_sample=False, max_new_tokens=32)


def test_a_base_that_changes_its_embeddings_is_refused(tmp_path, monkeypatch):
    base = write_base(tmp_path / "base", llama())
    adapter = write_adapter_for(tmp_path / "adapter", llama(), str(base), 2)
    read = plain_model.read_base

    def shifted(name: str) -> Any:
        base = read(name)
        base.get_input_embeddings().register_forward_hook(lambda module, ids, rows: rows + 1)
        return base

    monkeypatch.setattr(plain_model, "read_base", shifted)
    with pytest.raises(ModelError, match="LlamaForCausalLM does more with a token"):
        export(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def bad(tmp_path: Path, tiny_base: Path) -> dict[str, tuple[list[str], str]]:
    tiny = AutoModelForCausalLM.from_pretrained(tiny_base)
    name = str(tiny_base)
    good = str(write_adapter_for(tmp_path / "good", tiny, name, 2))
    nameless = write_adapter_for(tmp_path / "nameless", tiny, name, 2)
    config = json.loads((nameless / CONFIG_FILE).read_text())
    (nameless / CONFIG_FILE).write_text(json.dumps({**config, "base_model_name_or_path": None}))
    deeper = write_adapter_for(tmp_path / "deeper", make_bloom(n_layer=3), name, 2)
    chat = write_adapter_for(tmp_path / "chat", tiny, name, 2, template="chat")
    roles = write_adapter_for(tmp_path / "roles", tiny, name, 2, template="{a} {role}")
    odd = write_adapter_for(tmp_path / "odd", tiny, name, 2, generation={"top_p": 7})
    unknown = write_adapter_for(tmp_path / "unknown", tiny, name, 2, generation={"beams": 7})
    (tmp_path / "a_file").write_text("x")
    (tmp_path / "a_folder").mkdir()
    out = ["--output", "out"]
    return {
        "nothing": ([], "required: ADAPTER"),
        "no output": ([good], "--output is missing"),
        "unknown flag": ([good, "--ouput", "x"], "unknown flag --ouput; did you mean --output"),
        "dtype": ([good, *out, "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        "no adapter": (["nowhere", *out], "adapter nowhere: no such folder"),
        "existing folder": ([good, "--output", "a_folder"], "a_folder exists already"),
        "existing file": ([good, "--output", "a_file"], "a_file exists already"),
        "below a file": ([good, "--output", "a_file/x"], "a_file is not a folder"),
        "no base": ([str(nameless), *out], "names no base; give --model_name_or_path"),
        "no such base": ([good, *out, "--model_name_or_path", "./none"], "'./none': no such folder"),
        "hidden size": ([good, *out, "--model_name_or_path", "mini"], "size 32, but mini has hidden size 128"),
        "another base": ([str(deeper), *out], "num_layers 3, but .* has 2"),
        "no chat template": ([str(chat), *out], "tokenizer has no chat template"),
        "a column named role": ([str(roles), *out], "a column 'role'"),
        "settings out of range": ([str(odd), *out], "odd/softprompt.json: .*--top_p 7"),
        "unknown settings": ([str(unknown), *out], "unknown/softprompt.json: .*'beams'.*num_beams"),
    }


def test_bad_input_is_refused_in_one_line_and_writes_nothing(tmp_path, tiny_base, capsys, monkeypatch):
    cases = bad(tmp_path, tiny_base)
    capsys.readouterr()
    for name, (argv, message) in cases.items():
        line = refused(EXPORT, argv, capsys, monkeypatch, tmp_path)
        assert re.search(message, line), (name, line)


def test_a_full_disk_is_reported_before_and_while_writing(tmp_path, tiny_base, capsys, monkeypatch):
    adapter = str(write_adapter_for(tmp_path / "a", AutoModelForCausalLM.from_pretrained(tiny_base), str(tiny_base), 2))
    argv = [adapter, "--output", "deep/out"]
    (tmp_path / "deep").mkdir()
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
        assert "needs 0.07 GB, but" in refused(EXPORT, argv, capsys, monkeypatch, tmp_path)
    with monkeypatch.context() as patch:

        def full(self, folder, **kwargs):
            (folder / "model.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device")

        patch.setattr(BloomForCausalLM, "save_pretrained", full)
        line = refused(EXPORT, argv, capsys, monkeypatch, tmp_path)
        assert "deep/out: cannot be written" in line and "No space left on device" in line


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_an_adapter_of_another_base_is_exported_with_a_warning(engine, tmp_path, tiny_base, capsys):
    """A base that is merely named in another way is the same one."""
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    same = write_adapter_for(tmp_path / "same", base, os.path.relpath(tiny_base), 2)
    export(same, tmp_path / "of-same", model_name_or_path=str(tiny_base), engine=engine)
    assert "warning" not in capsys.readouterr().err
    adapter = write_adapter_for(tmp_path / "a", base, "hub/name", 2)
    export(adapter, tmp_path / "out", model_name_or_path=str(tiny_base), engine=engine)
    assert f"warning: adapter {adapter} was trained on hub/name, not on {tiny_base}\n" in capsys.readouterr().err
    with pytest.raises(SoftpromptError, match="exists already"):
        export(adapter, tmp_path / "out", model_name_or_path=str(tiny_base))
    with pytest.raises(AdapterError):
        export(tmp_path, tmp_path / "other")
