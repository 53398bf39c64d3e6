"""Initializers that google-research/prompt-tuning has and PEFT lacks: class labels, and frequent tokens."""

import json
from pathlib import Path

import peft
import pytest
import torch
from helpers.bases import make_bloom
from helpers.peers import peft_prompt
from helpers.small_bases import small_base
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, BloomForCausalLM, PreTrainedTokenizerFast

import softprompt
from softprompt.config.loader import train_config
from softprompt.config.value_parsers import parse_labels
from softprompt.prompt.adapter_io import load_adapter
from softprompt.prompt.initial import frequent_tokens, label_tokens
from softprompt.prompt.nearest_tokens import embedding_space, nearest_tokens
from softprompt.prompt.soft_prompt import InputEmbeddings
from softprompt.training.prompt_setup import initial_prompt
from softprompt.utils.errors import ConfigError


def start(base, tokenizer, **given):
    return initial_prompt(train_config(model_name_or_path="x", dataset="x", **given), tokenizer, base)


def rows_of(prompt, words):
    """Return, for each vector of a prompt, the row of the embeddings [V, H] that equals it."""
    return [next(i for i, word in enumerate(words) if torch.equal(word, vector)) for vector in prompt]


def labeled(labels, **given):
    return {"prompt_tuning_init": "CLASS_LABELS", "class_labels": labels, **given}


def merged_words(tokenizer) -> list[str]:
    """Return the tokens of a byte-level BPE in the order of its merges."""
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return ["".join(pair) for pair in merges]


def test_frequent_tokens_are_the_first_merges(tokenizer):
    words = tokenizer.get_vocab()
    expected = [words[word] for word in merged_words(tokenizer)]
    assert frequent_tokens(tokenizer, 9999, 300) == expected and len(expected) == 300 - 4 - 256
    assert frequent_tokens(tokenizer, 7, 300) == expected[:7]
    assert frequent_tokens(tokenizer, 9999, 270) == [id for id in expected if id < 270]


def test_added_tokens_are_not_frequent_tokens(tokenizer):
    more = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    more.add_tokens(["⟨mark⟩"])
    more.add_special_tokens({"pad_token": "<pad>"})
    assert frequent_tokens(more, 9999, 400) == frequent_tokens(tokenizer, 9999, 400)


def test_frequent_tokens_of_a_real_vocabulary(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizer-46k")
    found = frequent_tokens(tokenizer, 5000, 46_145)
    assert len(found) == 5000
    assert {tokenizer.decode([id]) for id in found} >= {" the", "的", "，", "我们"}
    common, rare = (sum(len(tokenizer.decode([id])) for id in ids) for ids in (found[:1000], range(40_000, 41_000)))
    assert common < rare  # rare tokens are longer


@pytest.mark.parametrize("length", [1, 9, 40])
def test_sampled_tokens_are_frequent_and_distinct(length, tokenizer):
    base = make_bloom()
    words = base.get_input_embeddings().weight.detach()
    settings = {"prompt_tuning_init": "SAMPLE_VOCAB", "num_virtual_tokens": length, "vocab_population": 40}
    found = rows_of(start(base, tokenizer, **settings), words)
    population = frequent_tokens(tokenizer, 40, 300)
    assert len(set(found)) == length and set(found) <= set(population)
    assert found == rows_of(start(base, tokenizer, **settings), words)
    if length > 1:
        assert found != rows_of(start(base, tokenizer, **settings, seed=1), words)


@pytest.mark.parametrize("kind", ["gemma", "llama"])
def test_the_size_of_the_words_is_that_of_the_modules_outputs(kind):
    base = small_base(kind)
    embed = base.get_input_embeddings()
    expected = embed(torch.arange(embed.num_embeddings)).double().square().mean().sqrt().item()
    assert InputEmbeddings(base).rms() == pytest.approx(expected, rel=1e-5)


def test_a_population_smaller_than_P_is_drawn_with_replacement(tokenizer):
    base = make_bloom()
    settings = {"prompt_tuning_init": "SAMPLE_VOCAB", "num_virtual_tokens": 30, "vocab_population": 4}
    found = rows_of(start(base, tokenizer, **settings), base.get_input_embeddings().weight.detach())
    assert set(found) <= set(frequent_tokens(tokenizer, 4, 300))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_label_is_the_mean_of_its_token_embeddings(dtype, tokenizer):
    base = make_bloom().to(dtype)
    words = base.get_input_embeddings().weight.detach()
    prompt = start(base, tokenizer, **labeled("正面, 很差,ok", num_virtual_tokens=7))
    assert prompt.shape == (7, 32) and prompt.dtype == torch.float32
    lengths = set()
    for vector, label in zip(prompt, ["正面", "很差", "ok"], strict=False):
        ids = tokenizer(label)["input_ids"]
        lengths.add(len(ids))
        torch.testing.assert_close(vector, sum(words[id].float() for id in ids) / len(ids), rtol=0, atol=1e-6)
    assert len(lengths) > 1
    rest = rows_of(prompt[3:], words.float())
    assert len(set(rest)) == 4 and set(rest) <= set(frequent_tokens(tokenizer, 5000, 300))


@pytest.mark.parametrize("kind", ["gemma", "gemma3_text", "llama"])
@pytest.mark.parametrize("init", ["TEXT", "SAMPLE_VOCAB"])
def test_initial_prompts_equal_pefts_where_the_embedding_module_scales(kind, init, tokenizer, tmp_path):
    base, text = small_base(kind), "下面是一段对话" if init == "TEXT" else None
    tokenizer.save_pretrained(tmp_path)
    mine = start(base, tokenizer, prompt_tuning_init=init, prompt_tuning_init_text=text, num_virtual_tokens=7, seed=7)
    torch.manual_seed(7)
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=7,
        prompt_tuning_init=init,
        prompt_tuning_init_text=text,
        tokenizer_name_or_path=str(tmp_path) if text else None,
    )
    assert torch.equal(mine, peft_prompt(peft.get_peft_model(base, config)))
    ratio = mine.norm() / base.get_input_embeddings().weight[tokenizer(text or "好")["input_ids"][:7]].norm()
    assert text is None or ratio == pytest.approx(1 if kind == "llama" else 32**0.5)


@pytest.mark.parametrize("given", [{"vocab_population": 40}, labeled("正面,很差")], ids=["words", "labels"])
def test_other_initializers_use_the_outputs_of_the_embedding_module(given, tokenizer):
    base = small_base("gemma")
    settings = {"prompt_tuning_init": "SAMPLE_VOCAB", "num_virtual_tokens": 6, **given}
    vectors = base.get_input_embeddings()(torch.arange(300))
    prompt = start(base, tokenizer, **settings)
    if "class_labels" in given:
        for vector, label in zip(prompt, ["正面", "很差"], strict=False):
            torch.testing.assert_close(vector, vectors[tokenizer(label)["input_ids"]].mean(0))
        prompt = prompt[2:]
    assert set(rows_of(prompt, vectors)) <= set(frequent_tokens(tokenizer, 5000, 300))
    ids, cosines = nearest_tokens(embedding_space(base), prompt, 1, len(tokenizer))
    assert ids[:, 0].tolist() == rows_of(prompt, vectors) and cosines.min() > 0.9999


def test_labels_may_fill_the_whole_prompt(tokenizer):
    base = make_bloom()
    prompt = start(base, tokenizer, **labeled("正面,负面", num_virtual_tokens=2))
    assert not torch.equal(prompt[0], prompt[1])


@pytest.mark.parametrize(
    "given, message",
    [
        ({"prompt_tuning_init": "CLASS_LABELS"}, "--prompt_tuning_init CLASS_LABELS needs --class_labels"),
        ({"class_labels": "a,b"}, "only used with --prompt_tuning_init CLASS_LABELS"),
        (labeled("a,,b"), "an empty or repeated label"),
        (labeled("a, "), "an empty or repeated label"),
        (labeled("a,b,a"), "an empty or repeated label"),
        (labeled("a,b,c", num_virtual_tokens=2), "3 labels for 2 virtual tokens"),
        (labeled(",".join("abcdefghijk")), "11 labels for 10 virtual tokens"),
        ({"vocab_population": 5}, "only used with --prompt_tuning_init SAMPLE_VOCAB or CLASS_LABELS"),
        (labeled("a,b", vocab_population=0), "--vocab_population 0 must be above 0"),
    ],
    ids=str,
)
def test_conflicting_settings_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        train_config(**given)


def test_a_label_with_an_unknown_token_is_refused():
    few = Tokenizer(models.WordLevel({"<unk>": 0, "good": 1, "bad": 2}, unk_token="<unk>"))
    few.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=few, unk_token="<unk>")
    assert label_tokens(tokenizer, ["good", "bad good"]) == [[1], [2, 1]]
    with pytest.raises(ConfigError, match="--class_labels '正面', 'bad 1': the tokenizer cannot express"):
        label_tokens(tokenizer, ["正面", "good", "bad 1"])


def test_a_label_without_tokens_is_refused():
    silent = Tokenizer(models.BPE({}, [], unk_token=None))
    with pytest.raises(ConfigError, match="'x': the tokenizer cannot express"):
        label_tokens(PreTrainedTokenizerFast(tokenizer_object=silent), ["x"])


def test_a_tokenizer_of_single_bytes_has_no_frequent_tokens():
    letters = {letter: id for id, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(letters, [])))
    with pytest.raises(ConfigError, match="--prompt_tuning_init: this tokenizer has only special tokens"):
        start(make_bloom(), tokenizer, prompt_tuning_init="SAMPLE_VOCAB", vocab_population=5)


def test_peft_loads_a_run_from_class_labels(tmp_path: Path, tiny_base: Path):
    """adapter_config.json names an initialization that PEFT has; the model card names the labels."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "好", "output": "正面"}\n' * 4, encoding="utf-8")
    where = {"model_name_or_path": str(tiny_base), "dataset": str(rows), "output_dir": str(tmp_path / "run")}
    run = softprompt.train(**where, max_steps=1, num_virtual_tokens=3, **labeled("正面,负面"))
    written = load_adapter(run.output_dir)
    assert written.config["prompt_tuning_init"] in [each.value for each in peft.PromptTuningInit]
    theirs = peft.PeftModel.from_pretrained(BloomForCausalLM.from_pretrained(tiny_base), run.output_dir)
    assert torch.equal(theirs.prompt_encoder["default"].embedding.weight, written.prompt)
    card = (run.output_dir / "README.md").read_text(encoding="utf-8")
    assert "| class_labels | 正面,负面 |" in card and "| prompt_tuning_init | CLASS_LABELS |" in card


def test_labels_may_be_separated_by_chinese_commas():
    assert parse_labels("正面， 负面,中性") == ["正面", "负面", "中性"]
