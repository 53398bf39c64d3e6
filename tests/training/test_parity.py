"""Equal to PEFT on the same base: parameters, first values, logits, loss, gradient, generations, adapter files."""

import copy
import json

import peft
import pytest
import torch
from helpers.bases import make_bloom
from helpers.peers import answers_of, collated, naive_loss, peft_model, peft_prompt, random_examples
from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM

from softprompt.config.loader import train_config
from softprompt.data.template import Template
from softprompt.data.tokenization import Example, count_targets, tokenize
from softprompt.engines.factory import padded_engine
from softprompt.engines.padded import PromptTunedModel, padded_forward
from softprompt.generation.requests import GenerationSettings
from softprompt.models.loading import freeze
from softprompt.prompt.adapter_folder import adapter_files, peft_config
from softprompt.prompt.adapter_io import Adapter, load_adapter
from softprompt.prompt.soft_prompt import PromptEmbedding, random_init
from softprompt.training.prompt_setup import initial_prompt
from softprompt.utils.atomic_io import write_folder

SHAPES = [(1, 1), (3, 7), (5, 13), (9, 2)]  # rows, longest row
FP32 = torch.float32
KINDS = pytest.mark.parametrize("kind", ["packed", "padded"])


def engine_of(base, tokenizer, tokens=60, dtype=FP32):
    return padded_engine(freeze(base, dtype), tokenizer, dtype, tokens)


def ours(engine, values, rows):
    """Mean loss over all targets and gradient [P, H] of our padded engine."""
    prompt = PromptEmbedding(values)
    targets = sum(map(count_targets, rows))
    total, count = engine.accumulate(prompt, rows, 1 / targets)
    assert count == targets
    return total.item() / targets, prompt.weight.grad


def theirs(base, values, rows, padding_side="left", autocast=None):
    """PEFT's mean loss over all targets and its gradient [P, H], the rows in one padded batch."""
    model = peft_model(base, values)
    batch = collated(rows, 3, padding_side)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        targets = (batch.labels[:, 1:] != -100).sum()
        out = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            labels=batch.labels,
            num_items_in_batch=targets,
        )
    out.loss.backward()
    return out.loss.item(), peft_prompt(model).grad, out.logits


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_parameter_line_of_the_reference_base():
    config = BloomConfig(vocab_size=46145, hidden_size=2048, n_layer=24, n_head=16)
    with torch.device("meta"):
        base = BloomForCausalLM(config).requires_grad_(False)
        prompt = PromptEmbedding(torch.empty(10, 2048))
    model = PromptTunedModel(prompt, base)
    line = "trainable params: 20,480 || all params: 1,303,132,160 || trainable%: 0.0016"
    assert model.trainable_parameters_line() == line
    assert "(prompt): PromptEmbedding(10, 2048)" in repr(model)


def test_parameter_line_equals_peft(capsys):
    base = make_bloom()
    peft_model(base, torch.zeros(7, 32)).print_trainable_parameters()
    line = PromptTunedModel(PromptEmbedding(torch.zeros(7, 32)), base.requires_grad_(False)).trainable_parameters_line()
    assert capsys.readouterr().out.strip() == line


@pytest.mark.parametrize("length", [None, 1, 4, 40])
@pytest.mark.parametrize("init", ["RANDOM", "TEXT", "SAMPLE_VOCAB"])
def test_initial_values_equal_peft(init, length, tiny_base, tokenizer):
    text = "下面是一段人与智能助手的对话。" if init == "TEXT" else None
    base = BloomForCausalLM.from_pretrained(tiny_base)
    given = {"num_virtual_tokens": length} if length else {}
    config = train_config(
        model_name_or_path="x", dataset="x", prompt_tuning_init=init, prompt_tuning_init_text=text, seed=7, **given
    )
    mine = initial_prompt(config, tokenizer, base)
    if length is None:
        length = len(tokenizer(text)["input_ids"]) if text else 10
    torch.manual_seed(7)
    peer = peft.get_peft_model(
        base,
        peft.PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=length,
            prompt_tuning_init=init,
            prompt_tuning_init_text=text,
            tokenizer_name_or_path=str(tiny_base) if text else None,
        ),
    )
    assert torch.equal(mine, peft_prompt(peer))


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("virtual", [1, 5, 100])
@pytest.mark.parametrize("rows, longest", SHAPES)
def test_logits_loss_and_gradient_equal_peft(rows, longest, virtual, padding_side, tokenizer):
    base, values = make_bloom(), random_init(virtual)(torch.empty(1, 32))
    examples = random_examples(rows, max(longest, 2))
    loss, gradient = ours(engine_of(base, tokenizer, 2), values, examples)
    peer_loss, peer_gradient, peer_logits = theirs(base, values, examples, padding_side)
    logits, _ = padded_forward(base, values, collated(examples, 3, padding_side))
    assert torch.equal(logits, peer_logits)
    assert loss == pytest.approx(peer_loss, rel=1e-6)
    assert relative(gradient, peer_gradient) < 1e-5


@pytest.mark.parametrize("virtual", [1, 5, 100])
def test_loss_and_gradient_equal_a_naive_reference(virtual, tokenizer):
    base, rows = make_bloom(seed=1), random_examples(7, 11, seed=3)
    rows += [Example([9, 8, 7], [-100, -100, -100])]  # a row without a target
    start = random_init(virtual)(torch.empty(1, 32))
    values = start.clone().requires_grad_()
    expected = naive_loss(base, values, rows)
    expected.backward()
    for tokens in (1, 60, 10_000):
        loss, gradient = ours(engine_of(base, tokenizer, tokens), start, rows)
        assert loss == pytest.approx(expected.item(), rel=1e-6)
        assert relative(gradient, values.grad) < 1e-5


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_bf16_is_as_accurate_as_peft(padding_side, tokenizer):
    """Both round the operands of matrix products to bf16 (a step of 2^-8) in the same places: autocast casts PEFT's
    weights, ours are stored in bf16. So both losses agree to well below that step and are within two steps of the fp32
    loss, and our gradient is at most 1.5 times as far from the fp32 gradient as PEFT's (sums are in another order)."""
    base, values = make_bloom(hidden_size=64, n_layer=3), random_init(8)(torch.empty(1, 64))
    rows = random_examples(9, 21)
    true_loss, truth, _ = theirs(base, values, rows, padding_side)
    peer_loss, peer, _ = theirs(base, values, rows, padding_side, torch.bfloat16)
    loss, gradient = ours(engine_of(copy.deepcopy(base), tokenizer, 9, torch.bfloat16), values, rows)
    assert loss == pytest.approx(peer_loss, rel=2**-10)
    assert loss == pytest.approx(true_loss, rel=2**-7)
    assert relative(gradient, truth) < max(1.5 * relative(peer, truth), 2**-8)


def test_bare_base_is_evaluated_without_a_prompt(tokenizer):
    base, rows = make_bloom(), random_examples(6, 9)
    total, count = engine_of(base, tokenizer).evaluate(None, rows)
    batch = collated(rows)
    out = base(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
    assert count == (batch.labels != -100).sum()
    assert total.item() / count == pytest.approx(out.loss.item(), rel=1e-5)


@KINDS
@pytest.mark.parametrize("virtual", [1, 10])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_answers_equal_peft(virtual, penalty, kind, tokenizer):
    base, values = make_bloom(seed=2).requires_grad_(False), random_init(virtual)(torch.empty(1, 32))
    peer = peft_model(base, values)
    texts = [[9, 8, 7, 30, 31], [12], [40, 41, 42, 43, 44, 45, 46, 47, 48]]
    settings = GenerationSettings(max_length=24, do_sample=False, repetition_penalty=penalty)
    together = answers_of(kind, base, tokenizer, [(text, values) for text in texts], settings)
    for text, answer in zip(texts, together, strict=True):
        # use_cache=False: peft 0.21.2's cached generation does not run on transformers 5.24
        out = peer.generate(
            input_ids=torch.tensor([text]),
            attention_mask=torch.ones(1, len(text), dtype=torch.long),
            max_length=24,
            do_sample=False,
            repetition_penalty=penalty,
            use_cache=False,
            pad_token_id=3,
            eos_token_id=2,
        )[0, len(text) :].tolist()
        expected = out[: out.index(2)] if 2 in out else out
        assert answer == expected
        assert answers_of(kind, base, tokenizer, [(text, values)], settings) == [expected]


@KINDS
def test_batched_greedy_answers_equal_peft(kind, tokenizer):
    base, values = make_bloom(seed=3).requires_grad_(False), random_init(4)(torch.empty(1, 32))
    examples = [Example(row.input_ids, row.input_ids) for row in random_examples(5, 9)]
    batch = collated(examples)
    peer = peft_model(base, values).generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=12,
        do_sample=False,
        use_cache=False,
        pad_token_id=3,
        eos_token_id=2,
    )
    settings = GenerationSettings(max_new_tokens=12, do_sample=False)
    answers = answers_of(kind, base, tokenizer, [(e.input_ids, values) for e in examples], settings)
    for answer, theirs_ in zip(answers, peer[:, batch.input_ids.shape[1] :].tolist(), strict=True):
        assert answer == (theirs_[: theirs_.index(2)] if 2 in theirs_ else theirs_)


def test_peft_loads_our_adapter(tmp_path):
    base, values = make_bloom(), random_init(6)(torch.empty(1, 32))
    adapter = Adapter(values, peft_config("some/base", base.config, values, "RANDOM"), {"template": "default"})
    write_folder(tmp_path / "adapter", adapter_files(adapter))
    rows = random_examples(4, 9)
    batch = collated(rows)
    expected, _ = padded_forward(base, values, batch)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    logits = loaded(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("init", ["RANDOM", "TEXT", "SAMPLE_VOCAB"])
def test_adapter_files_equal_peft_byte_for_byte(init, tmp_path, tiny_base):
    base = BloomForCausalLM.from_pretrained(tiny_base)
    text = {"prompt_tuning_init_text": "好", "tokenizer_name_or_path": str(tiny_base)} if init == "TEXT" else {}
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, prompt_tuning_init=init, **text)
    peer = peft.get_peft_model(base, config)
    peer.save_pretrained(tmp_path / "theirs")
    values = peft_prompt(peer).detach()
    ours_config = peft_config(str(tiny_base), base.config, values, init, text.get("prompt_tuning_init_text"))
    written = adapter_files(Adapter(values, ours_config))
    theirs_ = {p.name: p.read_bytes() for p in (tmp_path / "theirs").iterdir()}
    assert written["adapter_model.safetensors"] == theirs_["adapter_model.safetensors"]
    assert json.loads(written["adapter_config.json"]) | {"peft_version": peft.__version__} == json.loads(
        theirs_["adapter_config.json"]
    )
    if peft.__version__ == json.loads(written["adapter_config.json"])["peft_version"]:
        assert written["adapter_config.json"] == theirs_["adapter_config.json"]
    loaded = load_adapter(tmp_path / "theirs")
    assert torch.equal(loaded.prompt, values) and loaded.settings == {}
    assert loaded.base_model_name_or_path == str(tiny_base)


@pytest.fixture(scope="module")
def mini_base():
    from softprompt import mini

    base = BloomForCausalLM.from_pretrained(mini.BASE_DIR, dtype=FP32).eval().requires_grad_(False)
    return base, AutoTokenizer.from_pretrained(mini.BASE_DIR), mini.rows("sentiment", "eval")[:9]


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_mini_base_equals_peft(mini_base, padding_side):
    base, tokenizer, rows = mini_base
    examples = tokenize(rows, tokenizer, Template(), 256).examples
    values = random_init(10)(torch.empty(1, base.config.hidden_size))
    true_loss, truth, true_logits = theirs(base, values, examples, padding_side)
    loss, gradient = ours(engine_of(copy.deepcopy(base), tokenizer, 4), values, examples)
    logits, _ = padded_forward(base, values, collated(examples, tokenizer.pad_token_id, padding_side))
    assert torch.equal(logits, true_logits)
    assert loss == pytest.approx(true_loss, rel=1e-5)
    assert relative(gradient, truth) < 1e-5
    _, peer, _ = theirs(base, values, examples, padding_side, torch.bfloat16)
    engine = engine_of(copy.deepcopy(base), tokenizer, 9, torch.bfloat16)
    loss, gradient = ours(engine, values, examples)
    assert loss == pytest.approx(true_loss, rel=2**-6)
    assert relative(gradient, truth) < max(1.5 * relative(peer, truth), 2**-8)


@KINDS
def test_answers_of_the_mini_base_equal_peft(kind, mini_base):
    """One batch mixes questions of two prompts; PEFT answers those of each prompt separately."""
    base, tokenizer, rows = mini_base
    texts = [Template().render(row, tokenizer) for row in rows]
    words = base.get_input_embeddings().weight
    prompts = [words[tokenizer(start)["input_ids"]] for start in ("情感？情感？情感？", "今天这家酒店")]
    batch, ids = tokenizer(texts, return_tensors="pt", padding=True), tokenizer(texts)["input_ids"]
    asked, expected = [], []
    for values in prompts:
        peer = peft_model(base, values).generate(**batch, max_new_tokens=16, do_sample=False, use_cache=False)
        expected += tokenizer.batch_decode(peer[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        asked += [(text, values) for text in ids]
    settings = GenerationSettings(max_new_tokens=16, do_sample=False)
    mixed = [*range(0, len(asked), 2), *range(1, len(asked), 2)]
    answers = answers_of(kind, base, tokenizer, [asked[i] for i in mixed], settings, batch_size=4)
    assert [tokenizer.decode(answer) for answer in answers] == [expected[i] for i in mixed]
    assert len(set(expected)) > 2
